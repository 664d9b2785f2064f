"""sample.py --stages and --columns: every stage's clip, and the strip that compares them."""

import json
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from small_runs import sample


@pytest.fixture(scope="module")
def sampled(cascade_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips of six frames by a cascade of 8x8 and 16x16 pixels."""
    out = tmp_path_factory.mktemp("stages")
    options = ["--num", "2", "--stages", "--columns", "t=0,3,5", "--format", "npz,webp,gif"]
    finished = sample("--checkpoint", cascade_run, "--out", out, *options)
    assert finished.code == 0, finished.err
    return out


def cells(strip: Image.Image, rows: int, columns: int, pixels: int) -> np.ndarray:
    """Frames [rows, columns, H, W, 3] of a strip, whose labels are left of them."""
    cell = pixels + 2
    margin = strip.width - (columns * cell + 2)
    assert strip.height == rows * cell + 2
    array = np.asarray(strip)[:, margin:]
    return np.stack(
        [
            [array[2 + r * cell :, 2 + c * cell :][:pixels, :pixels] for c in range(columns)]
            for r in range(rows)
        ]
    )


def test_the_strip_shows_the_frames_asked_for(sampled: Path) -> None:
    with np.load(sampled / "samples.npz") as archive:
        videos = archive["videos"]
    strips = sorted((sampled / "stages").glob("*.png"))
    assert len(strips) == 2
    for path, video in zip(strips, videos, strict=True):
        found = cells(Image.open(path), rows=2, columns=3, pixels=96)
        shown = found[1][:, ::6, ::6]  # the last stage's, each pixel a square of 6
        assert np.array_equal(shown, video[[0, 3, 5]])
        # Stage 1 has half the pixels and half the frames, so frames 0, 1 and 2 there.
        blocks = found[0].reshape(3, 8, 12, 8, 12, 3)
        assert (blocks == blocks[:, :, :1, :, :1]).all()
        assert not np.array_equal(found[0][0], found[0][1])


def test_every_earlier_stage_has_its_video(sampled: Path) -> None:
    for path in (sampled / "stages").glob("*-stage-1.mp4"):
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert np.shape(frames) == (3, 128, 128, 3)
    assert len(list((sampled / "stages").iterdir())) == 4


def test_animations(sampled: Path) -> None:
    for ending in ("webp", "gif"):
        (path, _) = sorted(sampled.glob(f"clip-*.{ending}"))
        with Image.open(path) as animation:
            assert animation.size == (128, 128)
            assert getattr(animation, "n_frames", 1) > 1


def test_the_sheet_shows_them_too(sampled: Path) -> None:
    with np.load(sampled / "samples.npz") as archive:
        videos = archive["videos"]
    found = cells(Image.open(sampled / "contact-sheet.png"), rows=2, columns=3, pixels=96)
    assert np.array_equal(found[:, :, ::6, ::6], videos[:, [0, 3, 5]])


def test_they_go_with_the_next_run(sampled: Path, cascade_run: Path) -> None:
    assert json.loads((sampled / "samples.json").read_text())["stages"] is True
    (sampled / "stages" / "mine.png").write_text("mine")
    refused = sample("--checkpoint", cascade_run, "--out", sampled, "--num", "1")
    assert refused.code == 2
    assert "mine.png is not sample.py's" in refused.error
    (sampled / "stages" / "mine.png").unlink()
    finished = sample("--checkpoint", cascade_run, "--out", sampled, "--num", "1")
    assert finished.code == 0, finished.err
    assert not (sampled / "stages").exists()
    assert not list(sampled.glob("*.webp"))


@pytest.mark.parametrize(
    ("columns", "message"),
    [("6", "there is no frame 6; the last is 5"), ("1,x", "'x' is no frame's number")],
)
def test_frames_that_there_are_not(
    cascade_run: Path, tmp_path: Path, columns: str, message: str
) -> None:
    finished = sample("--checkpoint", cascade_run, "--out", tmp_path, "--columns", columns)
    assert finished.code == 2
    assert message in finished.error
