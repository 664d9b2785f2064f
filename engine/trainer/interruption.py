"""Stopping a run by Ctrl-C or SIGTERM, which is SLURM's preemption.

The run finishes its micro-batch and writes a checkpoint before it stops.
"""

import math
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType

from engine.trainer.ranks import Ranks


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


class Agreement:
    """The ranks' agreement to do something at the same time.

    They stop because a signal reached one of them, or save because one of their clocks says so. Its
    questions are collective.
    """

    def __init__(self, ranks: Ranks, save_every_minutes: float | None) -> None:
        self._ranks = ranks
        self._interruption = Interruption()
        self._save_every_seconds = 60 * (save_every_minutes or math.inf)
        self._saved = time.monotonic()
        self._num_asked, self._ask_every = 0, 1
        self.signal = 0
        """What the ranks have agreed to stop for; 0 before."""
        self.save_is_due = False
        """As of the last question."""

    def goes_on(self) -> bool:
        """Whether nothing has asked for the end, between micro-batches: most answers are free."""
        self._num_asked += 1
        return self._num_asked % self._ask_every != 0 or not self.told_to_stop()

    def told_to_stop(self) -> bool:
        """Whether a signal has reached any rank."""
        is_due = time.monotonic() - self._saved > self._save_every_seconds
        found = self._ranks.largest(2 * self._interruption.signal + int(is_due))
        self.signal, self.save_is_due = found // 2, found > 0  # who stops saves, too
        return self.signal > 0

    def step_took(self, seconds: float, num_micro_batches: int) -> None:
        """From now on ranks talk about once a second, by the slowest one's time."""
        if self._ranks.world_size > 1:
            slowest = self._ranks.largest(int(1000 * seconds)) / 1000
            self._ask_every = max(1, int(num_micro_batches / max(slowest, 1e-3)))

    def saved(self) -> None:
        """A checkpoint has been written."""
        self._saved, self.save_is_due = time.monotonic(), False


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
