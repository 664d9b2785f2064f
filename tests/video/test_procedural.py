from pathlib import Path

import numpy as np
import pytest

from engine.configuration import ProceduralClips
from engine.errors import UserError
from engine.video import procedural
from engine.video.index import VideoIndex
from engine.video.inspection import open_video
from engine.video.loader import ClipLoader
from engine.video.procedural import MAX_CLASSES, ensure_procedural, render_clip

SMALL = ProceduralClips(num_clips=10, num_frames=20, resolution=32)


@pytest.mark.parametrize("codec", ["mjpeg", "vp9"])
def test_the_files_hold_the_rendered_pixels(codec: str, tmp_path: Path) -> None:
    settings = ProceduralClips(num_clips=3, num_frames=20, resolution=64, codec=codec)  # type: ignore[arg-type]
    index = VideoIndex.load(ensure_procedural(tmp_path / "s", settings, 2))
    assert sorted(index.classes) == ["bouncing circle", "rotating square"]
    assert [e.path.partition("/")[2][:4] for e in index.entries] == ["0000", "0001", "0000"]
    assert {(e.num_frames, e.width, e.height, e.fps) for e in index.entries} == {(20, 64, 64, 25)}
    with open_video(index.path(1)) as container:
        decoded = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    rendered = render_clip(kind=0, seed=0, number=1, num_frames=20, resolution=64)
    error = np.abs(decoded.astype(float) - rendered)
    # 4:2:0 halves the colour's resolution at the shapes' edges; flat areas are near exact.
    assert np.median(error) <= 2
    assert error.mean() < 6
    other = render_clip(kind=0, seed=0, number=0, num_frames=20, resolution=64)
    assert np.abs(decoded.astype(float) - other).mean() > 12  # the bound would notice a mix-up


def test_same_seed_same_files(tmp_path: Path) -> None:
    one, two = (VideoIndex.load(ensure_procedural(tmp_path / n, SMALL, 8)) for n in "ab")
    assert one.fingerprint() == two.fingerprint()
    other = SMALL.model_copy(update={"seed": 1})
    assert VideoIndex.load(ensure_procedural(tmp_path / "c", other, 8)).fingerprint() != (
        one.fingerprint()
    )


def test_classes_differ_at_a_glance_and_everything_moves(tmp_path: Path) -> None:
    """On stage 1's view: 16x16, every 4th frame; nearest class mean, from clips not in the mean."""
    index = VideoIndex.load(
        ensure_procedural(tmp_path / "s", ProceduralClips(num_clips=48), MAX_CLASSES)
    )
    loader = ClipLoader(
        index,
        num_frames=8,
        frame_stride=4,
        resolution=64,
        view_resolution=16,
        batch_size=48,
        num_threads=1,
    )
    clips = next(loader)
    loader.close()
    video, labels = clips.video_BTCHW.numpy(), clips.labels_B.numpy()
    changes = np.abs(np.diff(video, axis=1)).mean(axis=(1, 2, 3, 4))
    assert changes.min() > 0.01
    colours = video.mean(axis=(1, 3, 4))
    right = 0
    for clip in range(48):
        means = [
            colours[(labels == label) & (np.arange(48) != clip)].mean(axis=0)
            for label in range(MAX_CLASSES)
        ]
        right += np.abs(np.array(means) - colours[clip]).sum(axis=1).argmin() == labels[clip]
    assert right >= 40  # 6 of 48 by chance


def test_made_once_and_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    path = ensure_procedural(tmp_path / "s", SMALL, 8, said.append)
    assert len(said) == 1
    monkeypatch.delattr(procedural, "write_procedural_clips")
    assert ensure_procedural(tmp_path / "s", SMALL, 8, said.append) == path
    assert len(said) == 1
    with pytest.raises(UserError, match="other settings"):
        ensure_procedural(tmp_path / "s", SMALL, 4)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    settings = tmp_path / "s" / "procedural.json"
    settings.mkdir(parents=True)  # fails for root too, whom no permissions stop
    with pytest.raises(UserError, match=f"cannot read {settings}: Is a directory; make it"):
        ensure_procedural(tmp_path / "s", SMALL, 8)
    settings.rmdir()
    settings.write_bytes(b"\xff")
    with pytest.raises(UserError, match="other settings"):
        ensure_procedural(tmp_path / "s", SMALL, 8)


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(procedural, "build_index", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ensure_procedural(tmp_path / "s", SMALL, 8)
    assert list(tmp_path.iterdir()) == []
    assert len(VideoIndex.load(ensure_procedural(tmp_path / "s", SMALL, 8)).entries) == 10


def test_nothing_of_the_users_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "holiday.mp4").write_text("x")
    with pytest.raises(UserError, match="not the sample data set"):
        ensure_procedural(tmp_path / "s", SMALL, 8)
    assert (tmp_path / "s" / "holiday.mp4").read_text() == "x"
    with pytest.raises(UserError, match="1 to 8"):
        ensure_procedural(tmp_path / "t", SMALL, 9)
