"""Training iterations: right, free of waiting, how long they take, and how long their kernels do.

Of each setup: G and D compute what plain PyTorch's do; one iteration; where the host waits; then
iterations of some numbers of samples, with and without CUDA graphs.
"""

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.first_hour.iterations import DEFAULT_SETUPS, CurrentIterations
from benchmarks.first_hour.kernel_times import kernels_of
from benchmarks.first_hour.parts import Part
from benchmarks.first_hour.scale import Scale
from benchmarks.network_check import check_networks
from benchmarks.plain import PlainOperators
from benchmarks.session import measure_rates
from benchmarks.whole_step import try_samples

STEP_BUILDS = ("ours", "graphs")
SECONDS_PER_SIZE = 2.0
ROUNDS_OF_WALL_TIME = 3


def parts(scale: Scale, names: tuple[str, ...]) -> Iterator[Part]:
    """Of the setups that are named, by default both stages as the paper trains them."""
    current = CurrentIterations(scale)
    yield Part("rates", partial(rates, scale))
    for setup in names or DEFAULT_SETUPS:
        yield Part(f"{setup}: networks as plain ones", partial(check, current, setup))
        yield Part(f"{setup}: an iteration", partial(one_iteration, scale, current, setup))
        yield Part(f"{setup}: waits", partial(waits, scale, current, setup))
        yield Part(f"{setup}: FLOPs", partial(flops, current, setup))
        for build in STEP_BUILDS:
            for samples in scale.samples:
                name = f"{setup}, {build}, {samples} samples"
                case = scale, current, setup, build, samples
                yield Part(name, partial(timed, *case))
                yield Part(f"{name}: kernels", partial(kernels_beside_wall_time, *case))


def check(current: CurrentIterations, setup: str) -> str:
    """Values and gradients of G and D. Raises Refused where they differ by more than rounding."""
    iterations = current.of(setup, "ours")
    plain = PlainOperators(channels_last=True)
    check_networks(iterations.trainer, iterations.config, plain.installed)
    return "as plain PyTorch, to rounding"


def one_iteration(scale: Scale, current: CurrentIterations, setup: str) -> dict[str, float]:
    """Seconds of the first, kernels compiled among them, and of the second; losses are finite."""
    iteration = current.of(setup, "ours").at(scale.samples[0])
    return {name: wall_seconds(iteration, scale.device) for name in ("first", "second")}


def waits(scale: Scale, current: CurrentIterations, setup: str) -> dict[str, int]:
    """How often the host waits in an iteration, by the line that makes it.

    PyTorch tells of its own synchronizing operators, not of calls of synchronize, nor of copies
    that do not block and come from pageable memory.
    """
    scale.require_gpu()
    iteration = current.of(setup, "ours").at(scale.samples[0])
    for _ in range(2):
        iteration()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            iteration()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    told = [w for w in caught if "synchroniz" in str(w.message)]
    return dict(Counter(f"{Path(w.filename).name}:{w.lineno}" for w in told))


def flops(current: CurrentIterations, setup: str) -> dict[str, Any]:
    """Executed FLOPs of an iteration of one sample."""
    iteration = current.of(setup, "ours").at(1)
    with FlopCounterMode(display=False) as counter:
        iteration()
    return {"kind": "flops", "setup": setup, "tflop_per_sample": counter.get_total_flops() / 1e12}


def rates(scale: Scale) -> dict[str, Any]:
    """Copy bandwidth and matmul rate."""
    return {"kind": "rates"} | measure_rates(scale.device).model_dump()


def timed(
    scale: Scale, current: CurrentIterations, setup: str, build: str, samples: int
) -> dict[str, Any]:
    """Seconds by the GPU's clock, and peak memory. Raises RuntimeError where it does not fit."""
    scale.require_gpu()
    iterations = current.of(setup, build)
    attempt = try_samples(iterations, samples, scale.device, SECONDS_PER_SIZE)
    if attempt is None:
        raise RuntimeError(f"{samples} samples do not fit")
    return {"kind": "iteration", "setup": setup, "build": build} | attempt.model_dump()


def kernels_beside_wall_time(
    scale: Scale, current: CurrentIterations, setup: str, build: str, samples: int
) -> dict[str, Any]:
    """Wall time of an iteration in a row of several, and what its kernels take together.

    Where they leave a gap, the GPU has waited for its host.
    """
    scale.require_gpu()
    iteration = current.of(setup, build).at(samples)
    iteration()
    seconds = wall_seconds(iteration, scale.device, ROUNDS_OF_WALL_TIME)
    found = kernels_of(iteration)
    return {
        "wall_seconds": seconds,
        "kernel_seconds": found.seconds,
        "launches": found.launches,
        "idle_share": 1 - found.seconds / seconds,
    }


def wall_seconds(run: Callable[[], object], device: torch.device, rounds: int = 1) -> float:
    """Of one round, until the device has nothing left to do."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(rounds):
        run()
    synchronize(device)
    return (time.perf_counter() - began) / rounds


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
