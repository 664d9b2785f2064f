"""Evaluation during training: its figures are those of what a user gets, and change nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import write_small
from small_runs import Tiny, contents, differences, logged, sample, two_ranks, write_tiny

from engine.dummy_passes import choose_passes, load_trained, run_passes
from engine.evaluation.frame_features import frame_features
from engine.sampled_dataset import draw_labels
from engine.sampling import SamplePlan, generate
from engine.trainer.checkpoint_meta import Evaluated
from engine.trainer.checkpoints import META, find_checkpoint
from engine.trainer.ranks import derived_seed
from engine.trainer.retention import best_checkpoint, is_best, keep_newest_and_best

NO_NETWORK = (
    *("--set", "training.evaluation.metrics=[motion,persistence]"),
    *("--set", "training.evaluation.best=motion"),
    *("--set", "training.evaluation.norm_statistics_passes=2"),
)
EVERY_STEP = ("--set", "training.evaluate_every=1", *NO_NETWORK)
WITH_AVERAGE = ("--set", "training.ema_decay=0.5")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def evaluated(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of both stages that evaluates."""
    out = tmp_path_factory.mktemp("evaluated")
    for stage in (1, 2):
        done = tiny.train(stage, out, *EVERY_STEP, *WITH_AVERAGE)
        assert done.code == 0, done.err
        assert "evaluation: 4 clips of " in done.out
    return out


def entries(stage_folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (stage_folder / "log.jsonl").read_text().splitlines()]


def motion_of_samples(checkpoint_path: Path, num_frames: int, stage: int) -> float:
    """Mean motion of the four clips that sampling makes of a checkpoint, all by itself."""
    checkpoint = find_checkpoint(checkpoint_path)
    seed = derived_seed("evaluation", 0, stage, 0)
    passes = choose_passes(checkpoint, num_frames=num_frames, sigma=1.0, seed=seed, num_passes=2)
    cascade = load_trained(checkpoint, torch.device("cpu"))
    run_passes(cascade, checkpoint, passes)
    plan = SamplePlan(checkpoint, draw_labels(checkpoint, 4, seed), num_frames, 1.0, seed, passes)
    clips = torch.stack(list(generate(cascade, plan))).permute(0, 1, 3, 4, 2)
    return float(frame_features(clips, [])["motion"].mean())


@pytest.mark.parametrize(("stage", "num_frames"), [(1, 3), (2, 6)])
def test_figures_are_of_what_a_user_gets(evaluated: Path, stage: int, num_frames: int) -> None:
    """Whole clips of averaged weights with fixed statistics: stage 1's three frames, or all that
    they unroll to."""
    folder = evaluated / f"stage{stage}"
    newest = find_checkpoint(folder)
    last = entries(folder)[-1]
    assert last["step"] == newest.step == 4
    generated = motion_of_samples(folder, num_frames, stage)
    # The log has both over the same real clips.
    of_real = last["evaluation/motion/real"]
    assert last["evaluation/motion"] > 0 < of_real
    first = entries(folder)[0]
    assert first["evaluation/motion/real"] == of_real
    assert first["evaluation/motion"] != last["evaluation/motion"], "it has not learned"
    real = generated / last["evaluation/motion"]
    features = sorted((folder / "features").glob("*.safetensors"))
    from safetensors.numpy import load_file

    rows = np.concatenate([load_file(file)["motion"] for file in features])
    assert rows.shape == (8, 1)
    assert real == pytest.approx(rows[:4].mean(), rel=1e-5)


def test_training_is_the_same_without(tiny: Tiny, evaluated: Path, tmp_path: Path) -> None:
    tiny.trained(1, tmp_path, *WITH_AVERAGE)
    left_out = [
        {name: value for name, value in entry.items() if not name.startswith("evaluation/")}
        for entry in logged(evaluated / "stage1")
    ]
    assert left_out == logged(tmp_path / "stage1")
    found = [contents(find_checkpoint(out / "stage1").path) for out in (evaluated, tmp_path)]
    assert differences(*found) == []


def test_best_is_a_checkpoint_by_itself(evaluated: Path, tmp_path: Path) -> None:
    """Its step is that of the motion that is nearest to real clips'."""
    folder = evaluated / "stage2"
    by_step = {each["step"]: abs(each["evaluation/motion"] - 1) for each in entries(folder)}
    best = min(by_step, key=lambda step: (by_step[step], step))
    link = folder / "checkpoints" / "best"
    found = find_checkpoint(link)
    assert found.step == best
    assert found.path == folder / "checkpoints" / f"step-{best:08d}"
    assert found.generators().keys() == {1, 2}, "previous.pt is found from there"
    done = sample("--checkpoint", link, "--num", "1", "--out", tmp_path)
    assert done.code == 0, done.err
    assert f"step-{best:08d}" in done.out or f"step {best}" in done.out


def test_two_ranks_measure_together(tiny: Tiny, tmp_path: Path) -> None:
    """Shares of the clips, at ZeRO-3, where no rank has all weights."""
    options = ["--set", "training.micro_batch=2", "--set", "training.zero_stage=3", *EVERY_STEP]
    done = two_ranks("engine/train.py", *tiny.options(1, tmp_path, "--max-steps", "2", *options))
    assert done.code == 0, done.err
    folder = tmp_path / "stage1"
    first, last = entries(folder)
    assert first["evaluation/motion"] != last["evaluation/motion"]
    found = motion_of_samples(folder, 3, stage=1)
    from safetensors.numpy import load_file

    (file,) = (folder / "features").glob("*.safetensors")
    real = load_file(file)["motion"][:4].mean()
    assert last["evaluation/motion"] == pytest.approx(found / real, rel=1e-5)


# --- which checkpoints are kept ---------------------------------------------------------------


def evaluation(badness: float, protocol: str = "p") -> Evaluated:
    return Evaluated(
        measured={"fvd": badness},
        of_real={"fvd": 1.0},
        metric="fvd",
        badness=badness,
        protocol=protocol,
    )


def kept(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def test_the_best_is_kept_beside_the_newest(tmp_path: Path) -> None:
    for step, badness in enumerate((5.0, 2.0, 2.0, 9.0, 4.0), start=1):
        improves = is_best(evaluation(badness), tmp_path)
        assert improves == (step < 3), "an equal one is not better"
        write_small(tmp_path, step, evaluation=evaluation(badness))
        keep_newest_and_best(write_small(tmp_path, 10 * step), 2)
        assert (tmp_path / "best").readlink() == Path(f"step-{min(step, 2):08d}")
    assert kept(tmp_path) == [2, 40, 50]


def test_only_values_of_one_protocol_compare(tmp_path: Path) -> None:
    write_small(tmp_path, 1, evaluation=evaluation(1.0, "of other clips"))
    assert is_best(evaluation(5.0), tmp_path)
    write_small(tmp_path, 2, evaluation=evaluation(5.0))
    assert best_checkpoint(tmp_path) == tmp_path / "step-00000002"


def test_without_evaluation_nothing_is_best(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write_small(tmp_path, step)
    damaged = write_small(tmp_path, 4)
    (damaged / META).write_text("[")
    keep_newest_and_best(damaged, 2)
    assert kept(tmp_path) == [3, 4]
    assert not (tmp_path / "best").is_symlink()


# --- what cannot be evaluated is told before training -----------------------------------------


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            ["training.evaluation.metrics=[motion,fid]", "training.evaluation.best=motion"],
            "evaluation.metrics: 'fid' is none of fvd,",
        ),
        (["training.evaluation.metrics=[motion]"], "evaluation.best 'fvd' is not measured"),
        ([], "no I3D weights at "),
    ],
)
def test_mistakes_are_told_first(
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    line: str,
) -> None:
    monkeypatch.setenv("SSW_I3D_WEIGHTS", str(tmp_path / "nowhere"))
    changes = [word for option in options for word in ("--set", option)]
    done = tiny.train(1, tmp_path, "--set", "training.evaluate_every=2", *changes)
    assert line in done.error
    assert not (tmp_path / "stage1" / "checkpoints").exists()


def test_too_few_videos_for_a_control(tiny: Tiny, tmp_path: Path) -> None:
    few = [f"data.path={tmp_path / 'few'}", "data.procedural.num_clips=3"]
    batch = ["training.global_batch=2", "training.micro_batch=2"]
    changes = [word for option in (*few, *batch) for word in ("--set", option)]
    done = tiny.train(1, tmp_path, *EVERY_STEP, *changes)
    assert "needs four videos that span 5 frames, and there are 3" in done.error


def test_real_windows_need_no_earlier_stages(tiny: Tiny, tmp_path: Path) -> None:
    """So there is nothing that could make a clip."""
    done = tiny.train(2, tmp_path, "--condition-on", "data", *EVERY_STEP)
    assert "evaluate_every needs the earlier stages" in done.error
