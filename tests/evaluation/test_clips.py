"""Which clips a protocol takes of a source, at which size, and how they are spoilt."""

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.errors import UserError
from engine.evaluation.clips import (
    Selection,
    check_sizes,
    choose_clips,
    clips_of,
    fitted,
    read_clip,
    viewed,
)
from engine.evaluation.protocol import EvaluationProtocol
from engine.evaluation.video_sources import ArchivedVideos, VideoShape, VideoSource


class Numbered(VideoSource):
    """Videos of so many frames whose pixels are the frame's number."""

    def __init__(self, lengths: list[int], size: tuple[int, int] = (8, 8)) -> None:
        super().__init__("numbered", [f"v{n}" for n in range(len(lengths))])
        self.lengths, self.size = lengths, size

    def digest(self, number: int) -> str:
        return f"digest {number}"

    def inspect(self, number: int) -> VideoShape:
        return VideoShape(self.lengths[number], *self.size)

    def read(self, number: int, shape: VideoShape, places: list[int]) -> NDArray[np.uint8]:
        return np.stack([np.full((*self.size, 3), place, np.uint8) for place in places])


def protocol(**changes: object) -> EvaluationProtocol:
    return EvaluationProtocol(name="test", **{"num_frames": 4, **changes})  # type: ignore[arg-type]


def taken(selection: Selection, given: EvaluationProtocol) -> dict[str, list[int]]:
    """Each video's frames that a clip is of."""
    return {
        selection.source.names[clip.number]: read_clip(selection.source, clip, given)[
            :, 0, 0, 0
        ].tolist()
        for clip in selection.clips
    }


def test_offsets() -> None:
    source = Numbered([10, 10])
    first = protocol(frame_stride=2, real_offset="first")
    assert taken(choose_clips(source, "real", first, None), first)["v0"] == [0, 2, 4, 6]
    # The generated ones have an offset of their own.
    other = protocol(frame_stride=2, real_offset="first", generated_offset="centre")
    assert taken(choose_clips(source, "generated", other, None), other)["v0"] == [1, 3, 5, 7]


def test_real_videos_have_more_frames_for_one_generated_one() -> None:
    given = protocol(frame_stride=2, real_stride=3, real_offset="first", generated_offset="first")
    source = Numbered([20, 20])
    assert taken(choose_clips(source, "real", given, None), given)["v0"] == [0, 6, 12, 18]
    assert taken(choose_clips(source, "generated", given, None), given)["v0"] == [0, 2, 4, 6]
    assert (given.source_frames("real"), given.source_frames("generated")) == (19, 7)
    with pytest.raises(UserError, match="has 18 frames, a clip of the protocol spans 19"):
        choose_clips(Numbered([18, 18]), "real", given, None)


def starts(source: Numbered, given: EvaluationProtocol, most: int | None = None) -> dict[str, int]:
    chosen = taken(choose_clips(source, "real", given, most), given)
    return {name: frames[0] for name, frames in chosen.items()}


def test_random_offsets_are_of_the_seed_and_the_content() -> None:
    source = Numbered([100] * 40)
    given = protocol(num_frames=10)
    found = starts(source, given)
    assert len(set(found.values())) > 20
    assert min(found.values()) >= 0
    assert max(found.values()) <= 90
    assert starts(Numbered([100] * 40), given, 7).items() <= found.items()
    assert starts(source, protocol(num_frames=10, seed=1)) != found
    # A window may begin at the last place that it fits in.
    assert set(starts(Numbered([5] * 60), protocol()).values()) == {0, 1}


def test_videos_are_chosen_at_random_and_more_extend_fewer() -> None:
    source = Numbered([4] * 30)
    five = choose_clips(source, "real", protocol(), 5)
    ten = choose_clips(source, "real", protocol(), 10)
    numbers = [clip.number for clip in ten.clips]
    assert [clip.number for clip in five.clips] == numbers[:5]
    assert numbers != sorted(numbers)
    assert len(set(numbers)) == 10


def test_short_videos_are_an_error_or_counted() -> None:
    source = Numbered([3, 6, 6, 6, 2])
    with pytest.raises(UserError, match=r"v\d has \d frames, a clip of the protocol spans 4"):
        choose_clips(source, "real", protocol(), None)
    dropped = choose_clips(source, "real", protocol(short="drop"), None)
    assert (len(dropped.clips), dropped.num_dropped) == (3, 2)
    assert "  2 were too short and left out" in dropped.lines()
    looping = protocol(short="loop", frame_stride=2, real_offset="first")
    looped = choose_clips(source, "real", looping, None)
    assert looped.num_looped == 5  # seven frames are spanned
    frames = taken(looped, looping)
    assert (frames["v0"], frames["v4"]) == ([0, 2, 1, 0], [0, 0, 0, 0])
    assert frames["v1"] == [0, 2, 4, 0]
    with pytest.raises(UserError, match="1 of 3 videos can be used"):
        choose_clips(Numbered([3, 9, 3]), "real", protocol(short="drop"), None)


def test_sizes_that_differ_must_be_brought_to_one() -> None:
    small = choose_clips(Numbered([4, 4]), "generated", protocol(), None)
    large = choose_clips(Numbered([4, 4], size=(8, 12)), "real", protocol(), None)
    with pytest.raises(
        UserError, match=r"has 8x8 pixels, .* 12x8; bring both .* resolution=PIXELS"
    ):
        check_sizes([large, small], protocol())
    check_sizes([large, small], protocol(resolution=8))
    check_sizes([small, small], protocol())


def test_fitting() -> None:
    """The middle of the longer side is kept; stretched, nothing is cut."""
    frames = np.zeros((1, 8, 16, 3), np.uint8)
    frames[:, :, 4:12] = 200
    cropped = fitted(frames, protocol(resolution=8))
    np.testing.assert_array_equal(cropped, np.full((1, 8, 8, 3), 200))
    stretched = fitted(frames, protocol(resolution=8, fit="stretch"))
    assert stretched.shape == (1, 8, 8, 3)
    assert (stretched[0, 0, 0, 0], stretched[0, 0, 4, 0]) == (0, 200)
    larger = fitted(frames, protocol(resolution=16))
    assert larger.shape == (1, 16, 16, 3)
    assert larger[:, :, 1:-1].min() == 200  # the outermost are interpolated with what is cut
    assert fitted(frames, protocol()) is frames


def test_views() -> None:
    clip = np.arange(6, dtype=np.uint8)[:, None, None, None].repeat(3, 3)
    plain, shuffled, frozen = (
        viewed(clip, view, "d", 0)[:, 0, 0, 0].tolist() for view in ("plain", "shuffled", "frozen")
    )
    assert plain == list(range(6))
    assert frozen == [0] * 6
    assert shuffled != plain
    assert sorted(shuffled) == plain
    assert viewed(clip, "shuffled", "d", 0)[:, 0, 0, 0].tolist() == shuffled
    orders = {tuple(viewed(clip, "shuffled", str(n), 0)[:, 0, 0, 0].tolist()) for n in range(50)}
    assert len(orders) > 40
    assert tuple(range(6)) not in orders
    two = clip[:2]
    assert viewed(two, "shuffled", "d", 3)[:, 0, 0, 0].tolist() == [1, 0]


def test_clips_are_read_ahead_in_their_order() -> None:
    source = Numbered([9] * 12)
    given = protocol(num_frames=9)
    selection = choose_clips(source, "real", given, None)
    found = clips_of(selection, range(2, 11), "shuffled", given, num_ahead=4, num_threads=3)
    expected = [
        viewed(read_clip(source, clip, given), "shuffled", clip.digest, given.seed)
        for clip in selection.clips[2:11]
    ]
    for frames, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(frames, wanted)


def test_an_error_while_reading_ahead_comes_in_its_place() -> None:
    class Damaged(Numbered):
        def read(self, number: int, shape: VideoShape, places: list[int]) -> NDArray[np.uint8]:
            if number == 5:
                raise UserError("damaged")
            return super().read(number, shape, places)

    source = Damaged([4] * 12)
    selection = choose_clips(source, "real", protocol(), None)
    place = [clip.number for clip in selection.clips].index(5)
    seen = 0
    with pytest.raises(UserError, match="damaged"):  # noqa: PT012
        for _ in clips_of(selection, range(12), "plain", protocol(), num_ahead=6, num_threads=2):
            seen += 1
    assert seen == place


def test_an_array_in_memory_is_a_source() -> None:
    videos = np.random.default_rng(0).integers(0, 256, (3, 4, 8, 8, 3), dtype=np.uint8)
    selection = choose_clips(ArchivedVideos("memory", videos), "real", protocol(), None)
    for clip in selection.clips:
        np.testing.assert_array_equal(
            read_clip(selection.source, clip, protocol()), videos[clip.number]
        )
