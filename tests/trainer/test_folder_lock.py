"""One run at a time in a stage's folder."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from forks import Forks, ranks_of
from small_runs import REPOSITORY, Tiny, environment

import engine.train
from engine.errors import UserError
from engine.trainer.folder_lock import LOCK, FolderLock

HOLD = """
import sys
from pathlib import Path
from engine.trainer.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1]), is_main=True)
lock.admit_others()
print("held", flush=True)
sys.stdin.read()
"""


def holder_of(folder: Path) -> subprocess.Popen[str]:
    """Another process that has the lock, as a run does."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=REPOSITORY,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_second_run_is_told_who_is_there(tiny: Tiny, tmp_path: Path, end: int) -> None:
    """And writes nothing; a holder that was killed holds nothing."""
    folder = tmp_path / "stage1"
    with holder_of(folder) as holder:
        before = sorted(path.name for path in folder.iterdir())
        error = tiny.train(1, tmp_path, "--max-steps", "1").error
        assert f"{folder} is in use by process {holder.pid} on {socket.gethostname()}" in error
        assert "wait for that run to end, or use another --out" in error
        assert sorted(path.name for path in folder.iterdir()) == before == [LOCK]
        assert tiny.train(2, tmp_path, "--max-steps", "1").error.startswith("error: stage 2 needs")
        holder.send_signal(end)
    assert tiny.train(1, tmp_path, "--max-steps", "1").code == 0
    assert json.loads((folder / LOCK).read_text())["pid"] == os.getpid()
    # Given back at the end: this process may go on.
    assert tiny.train(1, tmp_path, "--max-steps", "2").code == 0


def test_ranks_of_one_job_share_it(tmp_path: Path) -> None:
    """And another run waits for the last of them."""
    main = FolderLock(tmp_path, is_main=True)
    with pytest.raises(UserError, match="is in use by process"):
        FolderLock(tmp_path, is_main=False)  # before it is admitted
    main.admit_others()
    other = FolderLock(tmp_path, is_main=False)
    main.release()
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} on"):
        FolderLock(tmp_path, is_main=True)
    other.release()
    FolderLock(tmp_path, is_main=True).release()


def test_a_damaged_lock_file_still_locks(tmp_path: Path) -> None:
    main = FolderLock(tmp_path, is_main=True)
    (tmp_path / LOCK).write_text("[")
    with pytest.raises(UserError, match="is in use by another run"):
        FolderLock(tmp_path, is_main=True)
    main.release()


def test_two_ranks_train_in_one_folder(tiny: Tiny, forks: Forks, tmp_path: Path) -> None:
    options = tiny.options(1, tmp_path, "--max-steps", "1", "--set", "training.micro_batch=2")
    done = forks.job("train", [options], ranks_of(2))
    assert done.code == 0, done.err


def test_what_was_saved_while_a_run_started_is_not_passed_over(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was ending has written its last checkpoint after the next one was planned."""
    tiny.trained(1, tmp_path, "--max-steps", "1")
    checkpoints = tmp_path / "stage1/checkpoints"
    before = engine.train.settle

    def settle_then_save(*given: Any) -> Any:
        plan = before(*given)
        shutil.copytree(checkpoints / "step-00000001", checkpoints / "step-00000002")
        return plan

    with monkeypatch.context() as patch:
        patch.setattr(engine.train, "settle", settle_then_save)
        error = tiny.train(1, tmp_path, "--max-steps", "3").error
    assert "another run has saved checkpoints there while this one started" in error
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000001", "step-00000002"]
