"""The console is ours: what runs, where it writes, how far it is. Everybody else goes to a file.

DeepSpeed, DALI, NCCL and warnings write to file descriptors 1 and 2, some of them from C++. So the
descriptors themselves are pointed at a log file, and the console keeps copies of the originals.
"""

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TextIO

from tqdm import tqdm

from engine.durable_files import writing


class Console:
    """Lines and a progress bar on the real terminal, from rank 0 only."""

    def __init__(self, *, is_main: bool) -> None:
        self._is_main = is_main
        self._terminal = (os.dup(1), os.dup(2))
        self._out: TextIO = os.fdopen(self._terminal[0], "w", buffering=1)
        self._log: Path | None = None

    def capture(self, log: Path) -> None:
        """From here on, descriptors 1 and 2 of this process write to `log` (appended).

        Raises UserError when that file cannot be written.
        """
        with writing(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
        self._log = log

    def release(self) -> None:
        """Undo `capture`, so that a last line reaches the terminal."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # the log's disk is full: the last line says so
                stream.flush()
        for descriptor, original in enumerate(self._terminal, start=1):
            os.dup2(original, descriptor)

    def say(self, line: str) -> None:
        """A line for the user."""
        if self._is_main:
            tqdm.write(line, file=self._out)

    def complain(self, line: str) -> None:
        """A line that must be seen, from whichever rank."""
        tqdm.write(line, file=self._out)

    def crash(self, error: BaseException) -> None:
        """The end of an unexpected error; all of it is in the log as well."""
        text = "".join(traceback.format_exception(error))
        self.log(text)
        if self._log is not None:
            self.complain(f"{type(error).__name__}: {error} (traceback: {self._log})")

    def log(self, line: str) -> None:
        """For the log file only."""
        with contextlib.suppress(OSError):  # its disk is full: what ends the run must still be said
            print(line, file=sys.stderr, flush=True)

    def progress(self, start: int, total: int, label: str, unit: str = "step") -> "Progress":
        """A bar from `start` to `total`."""
        return Progress(self._out, start, total, label, unit, enabled=self._is_main)


class Progress:
    """Steps done, losses, speed and the time that is left."""

    def __init__(
        self, out: TextIO, start: int, total: int, label: str, unit: str, *, enabled: bool
    ) -> None:
        # A file or a CI log gets a line now and then instead of an animated bar.
        self._is_terminal = out.isatty()
        self._out = out
        self._enabled = enabled
        self._label, self._unit = label, unit
        self._start, self._total = start, total
        self._began = self._spoke = time.monotonic()
        self._bar = tqdm(
            total=total,
            initial=start,
            desc=label,
            file=out,
            unit=unit,
            dynamic_ncols=True,
            disable=not (enabled and self._is_terminal),
        )

    def update(
        self, step: int, measures: Mapping[str, float] = MappingProxyType({}), note: str = ""
    ) -> None:
        """Show step `step`; `note` is a few words more."""
        shown: dict[str, object] = {
            name: f"{measures[name]:.3f}" for name in ("loss_D", "loss_G") if name in measures
        }
        words = [f"{name}={value}" for name, value in shown.items()]
        self._bar.set_postfix_str(", ".join([*words, *([note] if note else [])]), refresh=False)
        self._bar.update(step - self._bar.n)
        now = time.monotonic()
        if (
            self._enabled
            and not self._is_terminal
            and (now - self._spoke > 10 or step == self._total)
        ):
            self._spoke = now
            seconds = (now - self._began) / max(1, step - self._start)
            left = tqdm.format_interval(seconds * (self._total - step))
            values = "".join(f"{k} {v}, " for k, v in shown.items())
            print(
                f"{self._label}: {self._unit} {step}/{self._total}, {values}"
                f"{seconds:.2f} s/{self._unit}, {left} left{f', {note}' if note else ''}",
                file=self._out,
                flush=True,
            )

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()
