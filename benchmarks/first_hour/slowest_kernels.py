"""The kernels that an iteration spends most of its time in, and whether their names say why."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.first_hour.iterations import DEFAULT_SETUPS, CurrentIterations
from benchmarks.first_hour.kernel_times import Kernel, kernels_of, slow_path
from benchmarks.first_hour.parts import Part
from benchmarks.first_hour.scale import Scale

NUM_SHOWN = 20
NAME_LENGTH = 200  # templates' names are longer than anyone reads


def parts(scale: Scale, names: tuple[str, ...]) -> Iterator[Part]:
    """One micro-batch per update, of the most samples of the scale."""
    current = CurrentIterations(scale)
    for setup in names or DEFAULT_SETUPS:
        samples = scale.samples[-1]
        name = f"{setup}, {samples} samples"
        yield Part(name, partial(slowest, scale, current, setup, samples))


def slowest(scale: Scale, current: CurrentIterations, setup: str, samples: int) -> dict[str, Any]:
    """The first `NUM_SHOWN` kernels, and every other one whose name tells of a slow path."""
    scale.require_gpu()
    iteration = current.of(setup, "ours").at(samples)
    for _ in range(2):  # kernels are compiled, algorithms chosen
        iteration()
    found = kernels_of(iteration)
    first, others = found.kernels[:NUM_SHOWN], found.kernels[NUM_SHOWN:]
    slow = [kernel for kernel in others if slow_path(kernel.name)]
    return {
        "kernel_seconds": found.seconds,
        "launches": found.launches,
        "slowest": [described(kernel, found.seconds) for kernel in first],
        "others_on_slow_paths": [described(kernel, found.seconds) for kernel in slow],
    }


def described(kernel: Kernel, total_seconds: float) -> dict[str, Any]:
    """With its share of all kernels' time."""
    return {
        "name": kernel.name[:NAME_LENGTH],
        "seconds": kernel.seconds,
        "launches": kernel.launches,
        "share": kernel.seconds / total_seconds,
        "slow_path": slow_path(kernel.name),
    }
