"""Clocks, turns and the arithmetic on what they say. All times are seconds.

On a GPU time is CUDA events', on a CPU it is this process's CPU time, which other load on the
machine moves less than wall time. Sides that are compared take turns in one process: every round
measures each of them once, and a ratio is taken within a round, so that a machine that slows down
slows both.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

HEAD_START_CYCLES = 2_000_000  # about 1 ms of an H100


class Spread(NamedTuple):
    """Median, 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    def text(self, digits: str = ".3g", scale: float = 1) -> str:
        """For a table: `median (p20 to p80)`."""
        median, low, high = (f"{scale * value:{digits}}" for value in self)
        return f"{median} ({low} to {high})"


def spread(values: Sequence[float]) -> Spread:
    """Percentiles by linear interpolation. Raises ValueError for no values."""
    if not values:
        raise ValueError("no measurements")
    return Spread(*np.percentile(values, (50, 20, 80)).tolist())


def paired_ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Spread of the ratios within each round. Raises ValueError for unequal numbers of rounds."""
    if len(numerators) != len(denominators):
        raise ValueError(f"{len(numerators)} rounds of one side and {len(denominators)} of another")
    return spread([a / b for a, b in zip(numerators, denominators, strict=True)])


def num_rounds(seconds_per_round: float, seconds: float, least: int, most: int) -> int:
    """How many rounds fit into `seconds`, between `least` and `most`."""
    return max(least, min(most, int(seconds / max(seconds_per_round, 1e-9))))


def num_copies(bytes_per_copy: int, cache_bytes: int, most: int = 16) -> int:
    """Copies of the arguments so that each is out of the cache when its turn comes again.

    All the others together must exceed the cache; one is enough where it does so itself twice.
    """
    if bytes_per_copy >= 2 * cache_bytes:
        return 1
    return min(most, 2 + cache_bytes // max(bytes_per_copy, 1))


def cache_bytes(device: torch.device) -> int:
    """The last-level cache: a GPU's L2, a CPU's L3 (32 MiB where the system does not say)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    try:
        size = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    except (ValueError, OSError):
        size = 0
    # Virtual machines report their host's, shared by many cores; no core here can fill more.
    return min(size, 32 << 20) if size > 0 else 32 << 20


def measure(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call.

    The device starts with a pause in which the host queues the call, so that a GPU's time is the
    kernels' and not Python's. A call that takes the host longer than that pause is bound by the
    host, and its time says so.
    """
    if device.type != "cuda":
        start = time.process_time()
        run()
        return time.process_time() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.cuda._sleep(HEAD_START_CYCLES)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


@dataclass
class Stopwatch:
    """The clock that pytest-benchmark reads: it stands still except while our side is measured."""

    seconds: float = 0.0

    def __call__(self) -> float:
        """Seconds so far."""
        return self.seconds


class Turns:
    """Sides that take turns, `main` among them.

    In a round pytest-benchmark calls `others`, `main`, and `others` again.
    """

    def __init__(
        self,
        sides: Mapping[str, Callable[[], object]],
        main: str,
        device: torch.device,
        stopwatch: Stopwatch,
    ) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in sides}
        self._sides, self._main = sides, main
        self._device, self._stopwatch = device, stopwatch

    def main(self) -> None:
        """The main side's turn, which alone advances the stopwatch."""
        self._stopwatch.seconds += self._take(self._main)

    def others(self) -> None:
        """Before `main` in one round and after it in the next: neither is always second."""
        if len(self.seconds[self._main]) % 2 == 0:
            for name in self._sides:
                if name != self._main:
                    self._take(name)

    def _take(self, name: str) -> float:
        taken = measure(self._sides[name], self._device)
        self.seconds[name].append(taken)
        return taken
