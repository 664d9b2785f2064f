"""Ctrl-C, SIGTERM (SLURM's preemption): finish the step, write a checkpoint, then stop."""

import signal
from types import FrameType


class Interruption:
    """Remembers that a signal asked for the end; a second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
