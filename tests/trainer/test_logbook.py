"""The logbook on a full disk; what it holds otherwise is tested with the runs that write it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_runs import full_disk

from engine.errors import UserError
from engine.trainer.logbook import Logbook

CPU = torch.device("cpu")
VIDEOS = torch.zeros(1, 2, 3, 4, 4, dtype=torch.uint8)

# TensorBoard writes in a thread of its own, which ends with the error.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.mark.parametrize(
    ("write", "file"),
    [
        (lambda logbook: logbook.scalars(1, {"loss": 0.0}), "log.jsonl"),
        (lambda logbook: logbook.videos(1, "samples", VIDEOS, 8), "tensorboard"),
    ],
    ids=["scalars", "videos"],
)
def test_a_full_disk(tmp_path: Path, write: Callable[[Logbook], None], file: str) -> None:
    logbook = Logbook(tmp_path, resumed_at=0, device=CPU)
    with full_disk(5), pytest.raises(UserError, match=f"cannot write {tmp_path / file}: "):
        write(logbook)


def test_failed_videos_after_the_step_that_is_resumed_are_forgotten(tmp_path: Path) -> None:
    logbook = Logbook(tmp_path, resumed_at=0, device=CPU)
    for step in (1, 2, 3):
        logbook.failed_videos(step, {f"{step}.mp4": "cannot read it"})
    logbook.close()
    Logbook(tmp_path, resumed_at=2, device=CPU).close()
    lines = (tmp_path / "failed-videos.jsonl").read_text().splitlines()
    assert [json.loads(line)["video"] for line in lines] == ["1.mp4", "2.mp4"]


def test_scalars_that_tensorboard_has_not_written_yet(tmp_path: Path) -> None:
    """Its thread holds them back, fails later, and the next call tells: at the latest the last."""
    line = f"cannot write {tmp_path / 'tensorboard'}: "
    logbook = Logbook(tmp_path, resumed_at=0, device=CPU)
    many = {f"loss {number}": 0.0 for number in range(1000)}  # 16 kB in log.jsonl, 50 kB here
    with full_disk(20_000), pytest.raises(UserError, match=line):
        logbook.scalars(1, many)
    logbook = Logbook(tmp_path, resumed_at=0, device=CPU)
    logbook.scalars(1, {"loss": 0.0})
    with full_disk(5), pytest.raises(UserError, match=line):
        logbook.close()


def test_what_only_closing_tells(tmp_path: Path) -> None:
    """As network file systems do."""
    logbook = Logbook(tmp_path, resumed_at=0, device=CPU)
    logbook._file = Path("/dev/full").open("w")  # noqa: SIM115 — close() is what is tested
    logbook._file.write("held back")
    with pytest.raises(UserError, match=f"cannot write {logbook.path}: No space left on device"):
        logbook.close()


def test_a_disk_that_is_full_from_the_start(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with full_disk(5), pytest.raises(UserError, match=f"cannot write {tmp_path / 'tensorboard'}: "):
        Logbook(tmp_path, resumed_at=0, device=CPU)
    log.write_text('{"step": 1}\n{"step": 2}\n')
    with full_disk(5), pytest.raises(UserError, match=f"cannot write {log}: "):
        Logbook(tmp_path, resumed_at=1, device=CPU)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'
