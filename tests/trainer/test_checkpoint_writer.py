"""Checkpoints that are written beside the training."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import FACTS
from forks import Forks, ranks_of
from small_runs import Tiny, contents, differences, full_disk, logged

from engine.errors import UserError
from engine.trainer import checkpoint_writer
from engine.trainer.checkpoint_meta import file_names
from engine.trainer.checkpoint_writer import CheckpointWriter
from engine.trainer.checkpoints import find_checkpoint, open_checkpoint
from engine.trainer.ranks import Ranks

ASYNCHRONOUS = ("--set", "training.asynchronous_checkpoints=true")
EVERY_STEP = ("--set", "training.checkpoint_every=1", "--set", "training.keep_checkpoints=9")


def writer(folder: Path, keep: int = 3) -> CheckpointWriter:
    return CheckpointWriter(folder, Ranks.alone(torch.device("cpu")), keep=keep)


def of_value(value: int, before: Callable[[], object] = lambda: None) -> dict[str, Any]:
    def content() -> dict[str, int]:
        before()
        return {"value": value}

    return dict.fromkeys(sorted(file_names(1)), content)


def finished(writes: CheckpointWriter) -> Path:
    """What `poll` gives when it gives something."""
    deadline = time.monotonic() + 60
    while (path := writes.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return path


def test_it_is_there_when_all_is_written(tmp_path: Path) -> None:
    """Not before: until then the older one is the newest."""
    going = threading.Event()
    writes = writer(tmp_path)
    writes.start(1, FACTS, of_value(1))
    assert writes.wait() == tmp_path / "step-00000001"
    writes.start(2, FACTS, of_value(2, going.wait))
    assert writes.is_pending
    assert writes.poll() is None
    assert [path.name for path in tmp_path.glob("step-*[0-9]")] == ["step-00000001"]
    going.set()
    path = finished(writes)
    assert path == tmp_path / "step-00000002"
    assert not writes.is_pending
    found = open_checkpoint(path)
    found.verify()
    assert found.read("generator.pt") == {"value": 2}
    assert writes.wait() is None


def test_the_next_one_waits_and_old_ones_go(tmp_path: Path) -> None:
    writes = writer(tmp_path, keep=2)
    for step in range(1, 5):
        writes.start(step, FACTS, of_value(step))
    writes.wait()
    assert [open_checkpoint(p).step for p in sorted(tmp_path.iterdir())] == [3, 4]


def test_a_failure_is_told_at_the_next_question(tmp_path: Path) -> None:
    """Naming the checkpoint; it is not there, and the one before is."""
    writes = writer(tmp_path)
    writes.start(1, FACTS, of_value(1))
    writes.wait()
    with full_disk(100):
        writes.start(2, FACTS, of_value(2))
        reason = r"cannot write .*step-00000002: File too large"
        with pytest.raises(UserError, match=reason):
            finished(writes)
    assert not writes.is_pending
    assert open_checkpoint(tmp_path / "step-00000001").step == 1
    writes.start(3, FACTS, of_value(3))
    assert writes.wait() == tmp_path / "step-00000003"


def test_a_run_that_ends_by_an_error_keeps_what_it_had_begun(tmp_path: Path) -> None:
    writes = writer(tmp_path)
    writes.start(1, FACTS, of_value(1, lambda: time.sleep(0.05)))
    writes.rescue()
    open_checkpoint(tmp_path / "step-00000001").verify()


@pytest.mark.parametrize("stage", [1, 2])
def test_checkpoints_are_those_that_training_waits_for(
    tiny: Tiny, cascade_run: Path, tmp_path: Path, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of its own step, though the next steps run while it is written."""
    save = checkpoint_writer.save_tensors

    def slowly(path: Path, value: Any) -> None:
        time.sleep(0.03)
        save(path, value)

    monkeypatch.setattr(checkpoint_writer, "save_tensors", slowly)
    more = ("--max-steps", "3", *EVERY_STEP, "--set", "training.ema_decay=0.5")
    previous = ("--previous", str(cascade_run)) if stage == 2 else ()
    outs = tmp_path / "waits", tmp_path / "beside"
    tiny.trained(stage, outs[0], *more, *previous)
    tiny.trained(stage, outs[1], *more, *previous, *ASYNCHRONOUS)
    for step in (1, 2, 3):
        waited, beside = (out / f"stage{stage}/checkpoints/step-{step:08d}" for out in outs)
        assert differences(contents(waited), contents(beside)) == []
        open_checkpoint(beside).verify()
    assert logged(outs[0] / f"stage{stage}") == logged(outs[1] / f"stage{stage}")


def test_two_ranks_write_beside_their_training(tiny: Tiny, forks: Forks, tmp_path: Path) -> None:
    options = ("--max-steps", "4", *EVERY_STEP, *ASYNCHRONOUS, "--set", "training.micro_batch=2")
    done = forks.job("train", [tiny.options(1, tmp_path, *options)], ranks_of(2))
    assert done.code == 0, done.err
    checkpoints = sorted((tmp_path / "stage1/checkpoints").iterdir())
    assert len(checkpoints) >= 2, "each that was due waited for the one before"
    for path in checkpoints:
        open_checkpoint(path).verify()
    assert find_checkpoint(tmp_path).step == 4


def test_one_ranks_full_disk_ends_both(tiny: Tiny, forks: Forks, tmp_path: Path) -> None:
    """With the reason, and with what was saved before."""
    options = ("--max-steps", "4", *EVERY_STEP, *ASYNCHRONOUS, "--set", "training.micro_batch=2")
    blocked = tmp_path / "stage1/checkpoints"
    first = tiny.options(1, tmp_path, *options[:1], "1", *options[2:])
    assert forks.job("train", [first], ranks_of(2)).code == 0
    ranks = ranks_of(2)
    ranks[1]["FULL_DISK_BYTES"] = "20000"
    done = forks.job("train", [tiny.options(1, tmp_path, *options)], ranks)
    assert done.code == 2
    assert "cannot write" in done.err
    assert "step-0000000" in done.err
    assert done.err.count("error: ") == 1
    assert find_checkpoint(tmp_path).step == 1
    assert blocked.is_dir()
