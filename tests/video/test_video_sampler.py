import numpy as np
import pytest

from engine.video.sampler import ClipSampler


def sampler(lengths: list[int], **options: object) -> ClipSampler:
    settings: dict = {
        "num_frames": 8,
        "frame_stride": 2,
        "seed": 3,
        "random_crop": True,
        "horizontal_flip": True,
    }
    return ClipSampler(lengths, **{**settings, **options})


def test_an_epoch_takes_every_usable_video_once_in_an_order_of_its_own() -> None:
    clips = sampler([40] * 50)
    epochs = [[clips.request(k).video for k in range(e * 50, e * 50 + 50)] for e in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_requests_depend_on_nothing_but_seed_and_number() -> None:
    one, other = sampler([40] * 7), sampler([40] * 7)
    forward = [one.request(k) for k in range(30)]
    backward = [other.request(k) for k in reversed(range(30))]
    assert forward == backward[::-1]
    assert forward != [sampler([40] * 7, seed=4).request(k) for k in range(30)]


def test_the_stream_is_the_same_on_every_machine_and_version() -> None:
    """A checkpoint's position means these clips for ever; a change here breaks every resume."""
    clips = sampler([40, 50, 60])
    assert [clips.request(k).video for k in range(6)] == [1, 2, 0, 1, 0, 2]
    assert [clips.request(k).start_frame for k in range(6)] == [18, 21, 13, 25, 18, 9]


def test_short_videos_are_left_out_to_the_frame() -> None:
    clips = sampler([14, 15, 16])  # a window of 8 frames at stride 2 spans 15
    assert (len(clips), clips.num_too_short) == (2, 1)
    requests = [clips.request(k) for k in range(400)]
    starts = {video: {r.start_frame for r in requests if r.video == video} for video in (1, 2)}
    assert starts == {1: {0}, 2: {0, 1}}
    with pytest.raises(ValueError, match="no video has 15 frames"):
        sampler([14, 3])


def test_choices_are_uniform_and_independent() -> None:
    clips = sampler([24] * 10)  # 10 starts
    requests = [clips.request(k) for k in range(4000)]
    starts = np.bincount([r.start_frame for r in requests], minlength=10)
    # 4000 draws over 10: sd of a count is 19; six of them
    assert np.abs(starts - 400).max() < 6 * 19
    values = np.array([[r.start_frame, r.crop_x, r.crop_y, r.flip] for r in requests], dtype=float)
    assert abs(values[:, 3].mean() - 0.5) < 6 * 0.5 / np.sqrt(4000)
    for column in (1, 2):
        assert abs(values[:, column].mean() - 0.5) < 6 * np.sqrt(1 / 12 / 4000)
        assert 0 <= values[:, column].min() < values[:, column].max() < 1
    correlation = np.corrcoef(values.T) - np.eye(4)
    assert np.abs(correlation).max() < 6 / np.sqrt(4000)


def test_crop_and_flip_can_be_switched_off() -> None:
    clips = sampler([40] * 5, random_crop=False, horizontal_flip=False)
    requests = [clips.request(k) for k in range(50)]
    assert {(r.crop_x, r.crop_y, r.flip) for r in requests} == {(0.5, 0.5, False)}
