"""A build that was killed leaves its lock: nothing may wait for it for ever."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_runs import environment

from engine.errors import UserError
from engine.trainer import adam
from engine.trainer.adam import OTHER_NODES_SECONDS, check_build_lock

CONNECT = """
import torch
from engine.trainer.ranks import Ranks
ranks = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
ranks.connect()
ranks.disconnect()
"""


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The lock of an operator, as old as a build that was killed long ago."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "cpu_adam").mkdir()
    path = tmp_path / "cpu_adam" / "lock"
    path.touch()
    old = time.time() - OTHER_NODES_SECONDS - 60
    os.utime(path, (old, old))
    return path


def test_no_run_on_cpus_builds_what_it_does_not_use(tmp_path: Path) -> None:
    (tmp_path / "deepspeed_shm_comm").mkdir()
    (tmp_path / "deepspeed_shm_comm" / "lock").touch()
    subprocess.run(
        [sys.executable, "-c", CONNECT],
        env=environment() | {"TORCH_EXTENSIONS_DIR": str(tmp_path)},
        timeout=120,
        check=True,
    )


def test_a_lock_that_nobody_holds_is_named(lock: Path) -> None:
    with pytest.raises(UserError, match="is left of a build that was killed") as caught:
        check_build_lock("cpu_adam")
    assert str(caught.value).startswith(str(lock))
    assert "\n" not in str(caught.value)
    assert lock.exists()
    lock.unlink()
    check_build_lock("cpu_adam")


def test_a_lock_that_is_held_is_pytorchs_to_wait_for(lock: Path) -> None:
    with lock.open():
        check_build_lock("cpu_adam")


def test_a_new_lock_may_be_another_nodes(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.utime(lock)
    monkeypatch.setattr(adam.time, "sleep", lambda seconds: lock.unlink())
    check_build_lock("cpu_adam")
