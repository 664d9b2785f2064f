"""Figures of training windows in the log: what they are of, when they stand there, and that they
change nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import Tiny, contents, differences, logged
from torch import Tensor

from engine import clip_figures
from engine.trainer.fakes import FakeBatch
from engine.trainer.networks import StageBuilder
from engine.trainer.ranks import Ranks
from engine.trainer.snapshots import (
    JUDDER,
    MOTION,
    VARIETY,
    Snapshots,
    WindowFigures,
    measure_real_windows,
)
from engine.video.dataset import describe, open_dataset


def pixels(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(1, -1, 1, 1, 1)


def test_by_hand() -> None:
    """Real windows step by 1 and by 2 evenly, unrelated in class 3; all steps are the middle."""
    real = torch.cat([pixels(0, 1, 2, 3), pixels(0, 2, 0, 2)])
    reference = WindowFigures(real, torch.tensor([3, 3]), period=2)
    one_phase = torch.cat([pixels(0, 0, 3, 3), pixels(1, 1, 4, 4)])
    found = reference.of(FakeBatch(one_phase, None, torch.tensor([3, 3])))
    # Phases of two steps move by (0 + 0) / 2 and 3; of the real ones by (1 + 2) / 2.
    assert found[MOTION] == pytest.approx((3 / 2) / (3 / 2))
    assert found[JUDDER] > 100
    assert found[VARIETY] == pytest.approx(0, abs=1e-6)
    # Samples of one class each have no pairs; without a period nothing judders.
    found = reference.of(FakeBatch(one_phase, None, torch.tensor([3, 0])))
    assert set(found) == {MOTION, JUDDER}
    found = WindowFigures(real, None, period=1).of(FakeBatch(one_phase, None, None))
    assert set(found) == {MOTION, VARIETY}


def test_the_reference_is_of_the_stages_real_windows(tiny: Tiny, ranks: Ranks) -> None:
    config = tiny.config()
    index = open_dataset(config.data, make=True, say=print)
    for number, period in ((1, 1), (2, 2)):
        builder = StageBuilder(config, number, ranks, describe(index, config.data))
        reference = measure_real_windows(builder, index)
        loader = builder.loader(index)
        clips = [next(loader) for _ in range(16)]  # of four each
        loader.close()
        video = torch.cat([clip.video_BTCHW for clip in clips])
        labels = torch.cat([clip.labels_B for clip in clips])
        assert reference is not None
        assert reference._motion == clip_figures.motion(video, period)
        assert reference._variety == clip_figures.variety(video, labels)
        assert reference.of(FakeBatch(video, None, labels)) == pytest.approx(
            {MOTION: 1, VARIETY: 1}
            | ({JUDDER: clip_figures.judder(video, period)} if period > 1 else {})
        )


def test_a_window_of_one_frame_has_none(tiny: Tiny, ranks: Ranks) -> None:
    config = tiny.config("stages.1.num_frames=1", "stages.2.num_frames=2")
    index = open_dataset(config.data, make=True, say=print)
    builder = StageBuilder(config, 1, ranks, describe(index, config.data))
    assert measure_real_windows(builder, index) is None


@pytest.mark.parametrize("stage", [1, 2])
def test_the_log_has_them_at_every_sample(
    tiny: Tiny, cascade_run: Path, tmp_path: Path, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of the samples; a run that stops between two goes on with the same lines."""
    samples: list[FakeBatch] = []
    generate = Snapshots.generate

    def noted(snapshots: Snapshots, trainer: Any) -> FakeBatch:
        samples.append(generate(snapshots, trainer))
        return samples[-1]

    monkeypatch.setattr(Snapshots, "generate", noted)
    every = ("--set", "training.sample_every=2", "--set", "training.log_every=3")
    options = [*every, "--previous", cascade_run] if stage == 2 else [*every]
    whole, parts, rare = tmp_path / "whole", tmp_path / "parts", tmp_path / "rare"
    trained = tiny.trained(stage, whole, "--max-steps", "4", *options)
    lines = logged(whole / f"stage{stage}")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    keys = {MOTION, VARIETY} | ({JUDDER} if stage == 2 else set())
    for line in lines:
        assert set(line) & {MOTION, JUDDER, VARIETY} == (keys if line["step"] % 2 == 0 else set())
    # Of steps 0, 2 and 4; the real motion that they are parts of is one.
    real = [
        clip_figures.motion(sample.video_BTCHW, period=stage) / line[MOTION]
        for sample, line in zip(samples[1:3], (lines[1], lines[3]), strict=True)
    ]
    assert real[0] == pytest.approx(real[1])

    tiny.trained(stage, parts, "--max-steps", "3", *options)
    resumed = tiny.trained(stage, parts, "--max-steps", "4", *options)
    assert logged(parts / f"stage{stage}") == lines
    assert differences(contents(resumed), contents(trained)) == []
    seldom = [*options, "--set", "training.sample_every=1000"]
    without = tiny.trained(stage, rare, "--max-steps", "4", *seldom)
    assert differences(contents(without), contents(trained)) == []
    assert not any(MOTION in line for line in logged(rare / f"stage{stage}"))


def test_the_log_is_json_that_others_read(tiny: Tiny, tmp_path: Path) -> None:
    tiny.trained(1, tmp_path, "--max-steps", "1", "--set", "training.sample_every=1")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    (line,) = (tmp_path / "stage1/log.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse)[MOTION] >= 0
