"""The released cascade: it loads, it is small, and its videos move."""

import json

from small_runs import REPOSITORY

from engine import Cascade

RELEASED = REPOSITORY / "docs" / "released" / "sample"


def test_its_videos_move() -> None:
    cascade = Cascade.from_pretrained(RELEASED)
    videos = cascade.generate(seed=1)
    assert videos.shape == (8, 32, 3, 64, 64)
    steps = videos.float().diff(dim=1).abs().mean(dim=(2, 3, 4))
    # Levels of 255 from one frame to the next: 3.6 on average, 0.55 of the square, when released.
    assert 2 < steps.mean() < 10
    assert (steps.mean(dim=1) > 0.3).all()
    assert len({tuple(video.flatten().tolist()) for video in videos}) == 8


def test_its_report_lies_beside_it() -> None:
    assert (RELEASED / "model.safetensors").stat().st_size < 5.5e6
    figures = json.loads((RELEASED / "figures.json").read_text())
    generated = next(row for row in figures["rows"] if row["name"] == "generated")
    assert 0.8 < generated["motion_ratio"] < 1.25
