"""Clocks, turns and the arithmetic on what they say. All times are seconds.

On a GPU time is CUDA events', on a CPU it is this process's CPU time, which other load on the
machine moves less than wall time. Sides that are compared take turns in one process: every round
measures each of them once, and a ratio is taken within a round, so that a machine that slows down
slows both.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

Run = Callable[[], object]
Sides = Mapping[str, Run]
"""What is compared, by name, each to be called again and again."""
HEAD_START_CYCLES = 2_000_000  # about 1 ms of an H100


class Spread(NamedTuple):
    """Median, 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    def __format__(self, digits: str) -> str:
        """For a table: `median (p20 to p80)`, each with these digits, such as `.3g`."""
        median, low, high = (f"{value:{digits}}" for value in self)
        return f"{median} ({low} to {high})"

    def times(self, scale: float) -> "Spread":
        """In another unit."""
        return Spread(*(scale * value for value in self))


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


def measure(run: Run, device: torch.device) -> float:
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


def sample(run: Run, device: torch.device, seconds: float, least: int, most: int) -> list[float]:
    """Seconds of calls that take about `seconds` together, between `least` and `most` of them."""
    once = measure(run, device)
    rounds = num_rounds(once, seconds, least, most)
    return [once, *(measure(run, device) for _ in range(rounds - 1))]


def take_turns(
    sides: Sides, main: str, rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every side in every round.

    The main side comes after the others in one round and before them in the next, so that neither
    is always second.
    """
    others = [name for name in sides if name != main]
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in ((*others, main), (main, *others))[number % 2]:
            seconds[name].append(measure(sides[name], device))
    return seconds
