"""Ctrl-C, SIGTERM (SLURM's preemption): finish the step, write a checkpoint, then stop."""

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType


class Interruption:
    """Remembers that a signal asked for the end; a second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.signal = 0
        """Which one came first; 0 when none did."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number


def follow_launcher() -> None:
    """Send this process SIGTERM when the launcher that started it is gone (Linux only).

    `deepspeed` starts a helper, which starts the ranks; killed, it leaves all of them behind, and
    they would train on with nobody to stop them. Without a launcher nothing is followed: a run
    may outlive its shell (nohup).
    """
    if "LOCAL_RANK" not in os.environ:
        return
    followed = [os.getpid()]
    if "deepspeed.launcher" in _read(os.getppid(), "cmdline"):
        followed.append(os.getppid())
    parents = [_parent(pid) for pid in followed]

    def follow() -> None:
        while [_parent(pid) for pid in followed] == parents:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, daemon=True).start()


def _parent(pid: int) -> str:
    """A process whose parent ends gets another one."""
    # "PID (NAME) STATE PARENT ...", where a name may hold anything.
    return "".join(_read(pid, "stat").rpartition(")")[2].split()[1:2])


def _read(pid: int, name: str) -> str:
    """A file of /proc; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""
