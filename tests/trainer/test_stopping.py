"""A signal is obeyed between micro-batches, and going on gives the run that did not stop."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Forks
from small_runs import Tiny, contents, differences, logged

from engine.trainer.checkpoints import open_checkpoint
from engine.trainer.fakes import ClipFakes, Inputs, WindowFakes
from engine.trainer.interruption import Agreement
from engine.trainer.ranks import Ranks

# Four micro-batches in each of two updates of D and one of G.
ACCUMULATED = ("--set", "training.micro_batch=1", "--set", "training.global_batch=4")
MICRO_BATCHES = 12


@pytest.fixture
def stopped_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A signal comes when the n-th micro-batch from then on draws what it generates from."""

    def prepare(number: int) -> None:
        count = 0

        def counted(draw: Any) -> Any:
            def inside(self: Any, batch_size: int) -> Inputs:
                nonlocal count
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGTERM)
                inputs: Inputs = draw(self, batch_size)
                return inputs

            return inside

        monkeypatch.setattr(ClipFakes, "draw", counted(ClipFakes.draw))
        monkeypatch.setattr(WindowFakes, "draw", counted(WindowFakes.draw))

    return prepare


# One draw is for the samples to look at, before the first iteration.
@pytest.mark.parametrize(
    ("stage", "number", "zero_stage"),
    [
        (1, 2, 1),  # in the first iteration's first update: nothing is done yet
        (1, 1 + MICRO_BATCHES + 4, 1),  # after a whole D update
        (1, 1 + MICRO_BATCHES + 6, 0),
        (2, 1 + MICRO_BATCHES + 6, 1),
        (2, 1 + MICRO_BATCHES + 11, 1),  # in G's update
        (1, 1 + MICRO_BATCHES + 10, 2),
        (2, 1 + MICRO_BATCHES + 7, 3),
    ],
)
def test_a_stop_within_an_iteration(
    tiny: Tiny,
    cascade_run: Path,
    tmp_path: Path,
    stopped_at: Callable[[int], None],
    stage: int,
    number: int,
    zero_stage: int,
) -> None:
    keys = (f"training.zero_stage={zero_stage}", "training.ema_decay=0.9")
    options: list[str | Path] = [*ACCUMULATED, *(word for key in keys for word in ("--set", key))]
    if stage == 2:
        bank = "stages.2.training.sample_bank={num_videos: 8, refresh_every: 2}"
        options += ["--previous", cascade_run, "--set", bank]
    out, last = tmp_path / "stopped", ("--max-steps", "3")
    whole = tiny.trained(stage, tmp_path / "whole", *last, *options)

    stopped_at(number)
    stopped = tiny.train(stage, out, *last, *options)
    assert stopped.code == 128 + signal.SIGTERM, stopped.err
    step = (number - 2) // MICRO_BATCHES
    (saved,) = (out / f"stage{stage}/checkpoints").iterdir()
    assert saved.name == f"step-{step:08d}"
    state = contents(saved)["rank-00000.pt"]["trainer"]
    assert state["step"] == step
    assert len(state["d_updates"]) == (number - 1) % MICRO_BATCHES // 4
    resumed = tiny.trained(stage, out, *last, *options)
    assert differences(contents(resumed), contents(whole)) == []
    assert logged(out / f"stage{stage}") == logged(tmp_path / f"whole/stage{stage}")


def test_stops_in_one_iteration_get_on(
    tiny: Tiny, tmp_path: Path, stopped_at: Callable[[int], None]
) -> None:
    """The first D update, then the second, in place of what was saved before the iteration."""
    options = (*ACCUMULATED, "--set", "training.checkpoint_every=1", "--max-steps", "3")
    whole = tiny.trained(1, tmp_path / "whole", *options)
    for number, num_updates in ((1 + MICRO_BATCHES + 6, 1), (2 + 5, 2), (2, 2)):
        stopped_at(number)
        stopped = tiny.train(1, tmp_path / "stopped", *options)
        (saved,) = (tmp_path / "stopped/stage1/checkpoints").iterdir()
        assert saved.name == "step-00000001"
        assert f"interrupted: saved {saved}" in stopped.out
        done = contents(saved)["rank-00000.pt"]["trainer"]["d_updates"]
        assert len(done) == num_updates
    resumed = tiny.trained(1, tmp_path / "stopped", *options)
    assert differences(contents(resumed), contents(whole)) == []


def test_a_damaged_checkpoint_of_that_step_is_replaced(
    tiny: Tiny, tmp_path: Path, stopped_at: Callable[[int], None]
) -> None:
    """Its run goes on from a copy elsewhere, is stopped at once, and is safe."""
    out, backup = tmp_path / "run", tmp_path / "backup"
    saved = tiny.trained(1, out, *ACCUMULATED, "--max-steps", "1")
    shutil.copytree(out, backup)
    (saved / "rank-00000.pt").write_bytes(b"damaged")
    stopped_at(2)
    resume = ("--resume", backup / "stage1/checkpoints/step-00000001", "--max-steps", "2")
    stopped = tiny.train(1, out, *ACCUMULATED, *resume)
    assert stopped.code == 128 + signal.SIGTERM
    assert f"interrupted: saved {saved}; the same command with --resume auto goes on" in stopped.out
    open_checkpoint(saved).verify()


def test_nothing_comes_between_reused_fakes_and_their_update(
    tiny: Tiny, tmp_path: Path, stopped_at: Callable[[int], None]
) -> None:
    """The second of two D updates draws what G's judges: the iteration goes to its end."""
    options = ("--set", "training.reuse_fakes=true", "--max-steps", "3")
    stopped_at(1 + 2)
    assert tiny.train(1, tmp_path, *options).code == 128 + signal.SIGTERM
    (saved,) = (tmp_path / "stage1/checkpoints").iterdir()
    assert saved.name == "step-00000001"
    assert contents(saved)["rank-00000.pt"]["trainer"]["d_updates"] == []


@pytest.mark.slow
def test_all_ranks_stop_at_one_micro_batch(
    tiny: Tiny, cascade_run: Path, forks: Forks, tmp_path: Path
) -> None:
    keys = ("training.micro_batch=1", "training.global_batch=8", "training.iterations=2")
    options = [word for key in keys for word in ("--set", key)]
    options += ["--previous", str(cascade_run)]
    runs = {
        name: tiny.options(2, tmp_path / name, *options) for name in ("whole", "stopped", "resumed")
    }
    whole = forks.script(2, "engine/train.py", *runs["whole"])
    assert whole.code == 0, whole.err
    stopped = forks.script(2, "tests/trainer/stopped_ranks.py", "7", *runs["stopped"])
    assert stopped.code == 128 + signal.SIGTERM, stopped.err
    (saved,) = (tmp_path / "stopped/stage2/checkpoints").iterdir()
    states = [contents(saved)[f"rank-0000{rank}.pt"]["trainer"] for rank in (0, 1)]
    # One draw for samples, then six micro-batches: a whole D update and half of the next.
    assert [len(state["d_updates"]) for state in states] == [1, 1]
    resumed = forks.script(2, "engine/train.py", *runs["stopped"])
    assert resumed.code == 0, resumed.err
    ends = [tmp_path / name / "stage2/checkpoints/step-00000002" for name in ("whole", "stopped")]
    assert differences(*map(contents, ends)) == []


@pytest.mark.parametrize(("minutes", "kept"), [("1e-9", [1, 2, 3]), ("1000", [3])])
def test_checkpoints_by_the_clock(
    tiny: Tiny, tmp_path: Path, minutes: str, kept: list[int]
) -> None:
    tiny.trained(1, tmp_path, "--max-steps", "3", "--set", f"training.checkpoint_minutes={minutes}")
    saved = sorted(path.name for path in (tmp_path / "stage1/checkpoints").iterdir())
    assert saved == [f"step-{step:08d}" for step in kept]


class TwoRanks(Ranks):
    """Whose other one is told what to say."""

    def largest(self, value: int) -> int:
        asked.append(value)
        return value


asked: list[int] = []


def test_ranks_talk_about_once_a_second() -> None:
    """By the slowest one's time of a step: 384 micro-batches in 24 s, sixteen a second."""
    ranks = TwoRanks(0, 2, 0, torch.device("cpu"))
    agreement = Agreement(ranks, None)
    asked.clear()
    assert all(agreement.goes_on() for _ in range(384))
    assert len(asked) == 384  # nobody knows yet how long they take
    agreement.step_took(24.0, 384)
    asked.clear()
    assert all(agreement.goes_on() for _ in range(384))
    assert asked == [0] * 24
    agreement.step_took(0.01, 12)
    asked.clear()
    assert all(agreement.goes_on() for _ in range(1200))
    assert len(asked) == 1
