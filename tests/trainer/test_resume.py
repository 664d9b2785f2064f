"""A run that stops and goes on is the run that did not stop, bit for bit (CPU, fp32)."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_runs import (
    REPOSITORY,
    Tiny,
    contents,
    differences,
    environment,
    launcher,
    logged,
    network_in,
    two_ranks,
)

from engine.trainer.step import Trainer


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    "overrides", [[], ["training.ema_decay=0.9"], ["training.micro_batch=2"]], ids=str
)
def test_resumed_run_equals_an_uninterrupted_one(
    tiny: Tiny, cascade_run: Path, tmp_path: Path, stage: int, overrides: list[str]
) -> None:
    changes = [part for override in overrides for part in ("--set", override)]
    outs = tmp_path / "whole", tmp_path / "parts"
    options = [*changes, "--previous", cascade_run] if stage == 2 else changes
    whole = tiny.trained(stage, outs[0], "--max-steps", "4", *options)
    tiny.trained(stage, outs[1], "--max-steps", "2", *options)
    parts = tiny.trained(stage, outs[1], "--max-steps", "4", *options)

    assert differences(contents(whole), contents(parts)) == []
    logs = [logged(out / f"stage{stage}") for out in outs]
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[1]] == [1, 2, 3, 4]
    # Equality means nothing if training changes nothing.
    early = outs[1] / f"stage{stage}" / "checkpoints" / "step-00000002"
    assert len(differences(contents(whole), contents(early))) > 100


def test_a_checkpoint_holds_all_that_training_changes(tiny: Tiny, tmp_path: Path) -> None:
    """The files by their contents: a name that vanished would be equal on both sides above."""
    held = contents(
        tiny.trained(1, tmp_path, "--max-steps", "1", "--set", "training.ema_decay=0.5")
    )
    model = network_in(held, "discriminators")
    assert any(name.endswith(".u") for name in model)
    assert any(name.endswith(".v") for name in model)
    for network, step in (("discriminators", 2), ("generator", 1)):
        shard = held[f"{network}-00000.pt"]
        assert shard["step"] == step
        assert set(shard["values"]) == {"weight", "exp_avg", "exp_avg_sq"}
        assert all(values.any() for values in shard["values"]["exp_avg_sq"].values())
    state = held["rank-00000.pt"]
    assert state["trainer"]["step"] == 1
    assert state["trainer"]["reals"]["position"] == 8  # two updates of D, four clips each
    assert set(state) == {"trainer", "torch", "cuda"}
    # What sampling reads is the average, not the weights, with singular vectors of its own.
    kept = held["generator.pt"]
    used = kept["generators"][1]
    assert all(n.endswith((".u", ".v")) for n in differences(used, kept["average"]))
    for name in (n.removesuffix("u") for n in used if n.endswith(".u")):
        matrix = used[f"{name}weight"].flatten(1)
        sigma = used[f"{name}u"] @ matrix @ used[f"{name}v"]
        assert sigma / torch.linalg.matrix_norm(matrix, ord=2) > 0.99
    raw = network_in(held, "generator")
    assert raw.keys() == kept["average"].keys()
    assert any(not raw[name].equal(value.flatten()) for name, value in kept["average"].items())


def test_average_is_the_recursion_of_the_logged_weights(tiny: Tiny, tmp_path: Path) -> None:
    more = ("--set", "training.ema_decay=0.75", "--set", "training.checkpoint_every=1")
    tiny.trained(1, tmp_path, "--max-steps", "2", *more)
    first, second = (contents(tmp_path / "stage1/checkpoints" / f"step-0000000{n}") for n in (1, 2))
    weights = network_in(second, "generator")
    for name, weight in weights.items():
        if name.endswith("weight"):
            expected = 0.75 * first["generator.pt"]["average"][name].flatten() + 0.25 * weight
            # One rounding each for the two products and the sum.
            difference = (second["generator.pt"]["average"][name].flatten() - expected).abs().max()
            assert difference <= 4 * 1.2e-7 * weight.abs().max()
        elif name.endswith((".u", ".v")):
            assert differences(second["generator.pt"]["average"][name], weight) == []


def test_only_the_newest_checkpoints_are_kept(tiny: Tiny, tmp_path: Path) -> None:
    settings = ("training.checkpoint_every=1", "training.keep_checkpoints=2")
    changes = [part for setting in settings for part in ("--set", setting)]
    tiny.trained(1, tmp_path, "--max-steps", "4", *changes)
    kept = sorted(path.name for path in (tmp_path / "stage1/checkpoints").iterdir())
    assert kept == ["step-00000003", "step-00000004"]


def test_nothing_is_left_to_do(tiny: Tiny, cascade_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(cascade_run, out)
    before = contents(out / "stage1/checkpoints/step-00000002")
    finished = tiny.train(1, out, "--max-steps", "2")
    assert finished.code == 0
    assert "nothing to do: step 2 of 2 is reached" in finished.out
    assert f"done: {out / 'stage1/checkpoints/step-00000002'}" in finished.out
    assert differences(before, contents(out / "stage1/checkpoints/step-00000002")) == []

    # The checkpoint that is named is the one there is.
    elsewhere = tiny.train(1, tmp_path / "new", "--max-steps", "2", "--resume", out / "stage1")
    assert f"done: {out / 'stage1/checkpoints/step-00000002'}" in elsewhere.out


def test_log_is_cut_back_to_the_step_that_is_resumed(
    tiny: Tiny, cascade_run: Path, tmp_path: Path
) -> None:
    """A crash leaves logged steps after the last checkpoint, the last line perhaps torn."""
    out = tmp_path / "run"
    shutil.copytree(cascade_run, out)
    shutil.rmtree(out / "stage1/checkpoints/step-00000002")
    with (out / "stage1/log.jsonl").open("a") as log:
        log.write('{"step": 3, "loss_D": 1.0}\n{"step": 4, "los')
    tiny.trained(1, out, "--max-steps", "3")
    assert [line["step"] for line in logged(out / "stage1")] == [1, 2, 3]
    whole = tmp_path / "whole"
    tiny.trained(1, whole, "--max-steps", "3")
    assert logged(out / "stage1") == logged(whole / "stage1")


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_changed_learning_rate_and_betas_are_used(
    tiny: Tiny, tmp_path: Path, zero_stage: int
) -> None:
    """The checkpoint's moments go on with the configuration's."""
    zero = ("--set", f"training.zero_stage={zero_stage}")
    before = contents(tiny.trained(1, tmp_path, "--max-steps", "1", *zero))
    settings = ("generator_lr=1e-12", "discriminator_lr=2e-12", "adam_betas=[0.25, 0.5]")
    changes = [part for s in settings for part in ("--set", f"training.{s}")]
    finished = tiny.train(1, tmp_path, "--max-steps", "2", *zero, *changes)
    assert finished.code == 0, finished.err
    assert (
        "changed since: generator_lr 0.0001 -> 1e-12, discriminator_lr 0.0005 -> 2e-12, "
        "adam_betas (0.0, 0.999) -> (0.25, 0.5)"
    ) in finished.out
    after = contents(tmp_path / "stage1/checkpoints/step-00000002")
    for name in ("generator", "discriminators"):
        first, second = (network_in(held, name) for held in (before, after))
        weights = {k: v for k, v in second.items() if not k.endswith((".u", ".v"))}
        assert max((v - first[k]).abs().max() for k, v in weights.items()) < 1e-9
        # β1 was 0: the moment was the last gradient, and is now a quarter of it at least.
        was, now = (held[f"{name}-00000.pt"]["values"]["exp_avg"] for held in (before, after))
        assert any(not torch.equal(now[k], was[k]) for k in was)
    # Said only when there is something to say.
    again = tiny.train(1, tmp_path, "--max-steps", "3", *zero, *changes)
    assert "resumed: " in again.out
    assert "changed since" not in again.out


def test_stage_2_goes_on_elsewhere_with_its_own_frozen_stages(
    tiny: Tiny, cascade_run: Path, tmp_path: Path
) -> None:
    """Neither stage 1 nor any passes are needed: previous.pt comes along."""
    old, out = tmp_path / "old", tmp_path / "new"
    shutil.copytree(cascade_run / "stage2", old / "stage2")
    options = ("--max-steps", "3", "--resume", old / "stage2")
    finished = tiny.train(2, out, *options, "--previous", tmp_path / "any")
    assert finished.code == 0, finished.err
    assert "previous: " not in finished.out
    assert "note: --previous is not used: a resumed run keeps its own" in finished.out
    frozen = [folder / "stage2/previous.pt" for folder in (old, out)]
    assert frozen[0].read_bytes() == frozen[1].read_bytes()

    frozen[0].write_bytes(frozen[0].read_bytes()[:-1])
    refused = tiny.train(2, tmp_path / "third", *options)
    assert f"{frozen[0]} is damaged, or not what" in refused.error
    assert not (tmp_path / "third/stage2/previous.pt").exists()


def test_a_stage_that_is_frozen_early_is_named(tiny: Tiny, tmp_path: Path) -> None:
    more = ("--set", "stages.1.training.iterations=3", "--max-steps", "1")
    tiny.trained(1, tmp_path, *more)
    finished = tiny.train(2, tmp_path, *more)
    assert finished.code == 0, finished.err
    assert "note: stage 1 is frozen after 1 of 3 iterations" in finished.out


def test_max_steps_wins_over_the_configured_iterations(tiny: Tiny, tmp_path: Path) -> None:
    more = ("--set", "training.iterations=1")
    assert tiny.trained(1, tmp_path, "--max-steps", "2", *more).name == "step-00000002"


def started(command: list[str], out: Path) -> subprocess.Popen[str]:
    """A process that has trained two steps of stage 1."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,  # a process group, to be killed as one
    )
    log = out / "stage1/log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


@pytest.mark.long
def test_ranks_stop_when_the_launcher_is_killed(
    tiny: Tiny, cascade_run: Path, tmp_path: Path
) -> None:
    """`deepspeed` itself, whose helper lives on."""
    options = tiny.options(1, tmp_path, "--set", "training.iterations=100000")
    process = started(launcher(1, "engine/train.py", *options), tmp_path)
    try:
        process.kill()
        # The pipe ends when the helper and its ranks, who hold it too, have ended.
        stdout, _ = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    (saved,) = (tmp_path / "stage1/checkpoints").iterdir()
    assert f"interrupted: saved {saved}; the same command goes on" in stdout


@pytest.mark.long
def test_ranks_that_were_told_to_stop_leave_together(tiny: Tiny, tmp_path: Path) -> None:
    """A launcher ends the other ranks when one is gone: rank 0 has more to write after the
    checkpoint."""
    options = ("--set", "training.micro_batch=2", "--set", "training.iterations=100000")
    done = two_ranks("tests/trainer/closes_late.py", *tiny.options(1, tmp_path, *options))
    assert done.code == 128 + signal.SIGTERM, done.err
    assert "closed late" in (tmp_path / "stage1/logs/rank-00000.log").read_text()
    (saved,) = (tmp_path / "stage1/checkpoints").iterdir()
    assert f"interrupted: saved {saved}; the same command goes on" in done.out
    assert "done: " not in done.out
    assert "Traceback" not in done.out + done.err


def test_a_command_that_would_start_anew_is_not_the_one_that_goes_on(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_step = Trainer.train_step

    def step_and_signal(trainer: Trainer, goes_on: Callable[[], bool]) -> dict[str, float]:
        measures = train_step(trainer, goes_on)
        os.kill(os.getpid(), signal.SIGINT)
        return measures

    monkeypatch.setattr(Trainer, "train_step", step_and_signal)
    stopped = tiny.train(1, tmp_path, "--resume", "none")
    assert stopped.code == 128 + signal.SIGINT
    saved = tmp_path / "stage1/checkpoints/step-00000001"
    said = f"interrupted: saved {saved}; the same command with --resume auto goes on"
    assert stopped.out.splitlines()[-1] == said


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_saves_and_another_process_goes_on_exactly(
    tiny: Tiny, cascade_run: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "interrupted"
    options = tiny.options(1, out, "--set", "training.iterations=100000")
    command = [sys.executable, str(REPOSITORY / "engine/train.py"), *options]
    process = started(command, out)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number, stderr  # a script does not go on to stage 2
    assert stderr == ""
    assert "done: " not in stdout

    (saved,) = (out / "stage1/checkpoints").iterdir()
    step = int(saved.name.removeprefix("step-"))
    assert f"interrupted: saved {saved}; the same command goes on" in stdout
    last = str(step + 1)
    resumed = tiny.trained(1, out, "--max-steps", last)
    whole = tiny.trained(1, tmp_path / "whole", "--max-steps", last)
    assert differences(contents(resumed), contents(whole)) == []
    assert logged(out / "stage1") == logged(tmp_path / "whole/stage1")
