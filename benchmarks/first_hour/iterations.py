"""Training iterations: right, free of waiting, how long they take, and how much memory.

An iteration here has one micro-batch per update.
"""

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.first_hour.kernel_times import described, kernels_of, slow_path
from benchmarks.first_hour.parts import Part
from benchmarks.first_hour.scale import Scale
from benchmarks.session import measure_rates
from benchmarks.setups import BUILDS, SETUPS, Setup, config_of
from benchmarks.whole_step import Iterations, executed_tflop, free_memory, try_samples
from engine.planning.meta_step import run_step
from engine.planning.rank_memory import Scaling, find_peak
from engine.trainer.ranks import Ranks

DEFAULT_SETUPS = ("stage1", "stage2_generated")
"""The paper's two stages as it trains them."""
STEP_BUILDS = ("ours", "graphs")
MEMORY_BUILDS = ("ours", "blocks")
"""They differ in what they make again."""
SECONDS_PER_SIZE = 2.0
ROUNDS_OF_WALL_TIME = 3
NUM_SHOWN = 20


class CurrentIterations:
    """The networks of a setup in a build; asking for others lets go of them.

    In a job of one rank, which is connected for as long as the process is.
    """

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self._ranks = Ranks(rank=0, world_size=1, local_rank=0, device=scale.device)
        self._ranks.connect()
        self._key: tuple[str, str] | None = None
        self._iterations: Iterations | None = None

    def of(self, setup: str, build: str = "ours") -> Iterations:
        """As they were left, or initialised."""
        if self._key != (setup, build) or self._iterations is None:
            self.close()
            chosen = self.setup(setup)
            overrides = self.scale.overrides(chosen.number)
            made = Iterations(chosen, BUILDS[build], self._ranks, overrides)
            made.accelerate()
            self._key, self._iterations = (setup, build), made
        return self._iterations

    def setup(self, name: str) -> Setup:
        """At the scale."""
        return SETUPS[name]._replace(samples=self.scale.samples[0])

    def close(self) -> None:
        """Free their memory."""
        if self._iterations is not None:
            self._iterations.close()
        self._key = self._iterations = None
        if self.scale.device.type == "cuda":
            free_memory()


# -------------------------------------------------------------------------------------- steps


def steps(scale: Scale, names: tuple[str, ...]) -> Iterator[Part]:
    """Of each setup: G and D compute what plain PyTorch's do; one iteration; where the host waits.

    Then iterations of some numbers of samples, with and without CUDA graphs.
    """
    current = CurrentIterations(scale)
    yield Part("rates", lambda: {"kind": "rates"} | measure_rates(scale.device).model_dump())
    for setup in names or DEFAULT_SETUPS:
        for name, run in (
            ("networks as plain ones", check),
            ("an iteration", one_iteration),
            ("waits", waits),
            ("FLOPs", flops),
        ):
            yield Part(f"{setup}: {name}", partial(run, current, setup))
        for build in STEP_BUILDS:
            for samples in scale.samples:
                name, case = f"{setup}, {build}, {samples} samples", (setup, build, samples)
                yield Part(name, partial(timed, current, *case))
                yield Part(f"{name}: kernels", partial(kernels_beside_wall_time, current, *case))


def check(current: CurrentIterations, setup: str) -> str:
    """Values and gradients of G and D. Raises Refused where they differ by more than rounding."""
    current.of(setup).check()
    return "as plain PyTorch, to rounding"


def one_iteration(current: CurrentIterations, setup: str) -> dict[str, float]:
    """Seconds of the first, kernels compiled among them, and of the second; losses are finite."""
    iteration = current.of(setup).at(current.scale.samples[0])
    return {name: wall_seconds(iteration, current.scale.device) for name in ("first", "second")}


def waits(current: CurrentIterations, setup: str) -> dict[str, int]:
    """How often the host waits in an iteration, by the line that makes it.

    PyTorch tells of its own synchronizing operators, not of calls of synchronize, nor of copies
    that do not block and come from pageable memory.
    """
    current.scale.require_gpu()
    iteration = current.of(setup).at(current.scale.samples[0])
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
    tflop = executed_tflop(current.of(setup).at(1))
    return {"kind": "flops", "setup": setup, "tflop_per_sample": tflop}


def timed(current: CurrentIterations, setup: str, build: str, samples: int) -> dict[str, Any]:
    """Seconds by the GPU's clock, and peak memory. Raises RuntimeError where it does not fit."""
    current.scale.require_gpu()
    device = current.scale.device
    attempt = try_samples(current.of(setup, build), samples, device, SECONDS_PER_SIZE)
    if attempt is None:
        raise RuntimeError(f"{samples} samples do not fit")
    return {"kind": "iteration", "setup": setup, "build": build} | attempt.model_dump()


def kernels_beside_wall_time(
    current: CurrentIterations, setup: str, build: str, samples: int
) -> dict[str, Any]:
    """Wall time of an iteration in a row of several, and what its kernels take together.

    Where they leave a gap, the GPU has waited for its host.
    """
    current.scale.require_gpu()
    iteration = current.of(setup, build).at(samples)
    iteration()
    seconds = wall_seconds(iteration, current.scale.device, ROUNDS_OF_WALL_TIME)
    found = kernels_of(iteration)
    kernel_seconds = sum(kernel.seconds for kernel in found)
    return {
        "wall_seconds": seconds,
        "kernel_seconds": kernel_seconds,
        "launches": sum(kernel.launches for kernel in found),
        "idle_share": 1 - kernel_seconds / seconds,
    }


def wall_seconds(run: Callable[[], object], device: torch.device, rounds: int = 1) -> float:
    """Of one round, until the device has nothing left to do."""
    synchronize = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    synchronize()
    began = time.perf_counter()
    for _ in range(rounds):
        run()
    synchronize()
    return (time.perf_counter() - began) / rounds


# ------------------------------------------------------------------------------------- profile


def profile(scale: Scale, names: tuple[str, ...]) -> Iterator[Part]:
    """The kernels that an iteration of the most samples of the scale spends most of its time in."""
    current, samples = CurrentIterations(scale), scale.samples[-1]
    for setup in names or DEFAULT_SETUPS:
        yield Part(f"{setup}, {samples} samples", partial(slowest, current, setup, samples))


def slowest(current: CurrentIterations, setup: str, samples: int) -> dict[str, Any]:
    """The first `NUM_SHOWN` kernels, and every other one whose name tells of a slow path."""
    current.scale.require_gpu()
    iteration = current.of(setup).at(samples)
    for _ in range(2):  # kernels are compiled, algorithms chosen
        iteration()
    found = kernels_of(iteration)
    seconds = sum(kernel.seconds for kernel in found)
    first, others = found[:NUM_SHOWN], found[NUM_SHOWN:]
    slow = [kernel for kernel in others if slow_path(kernel.name)]
    return {
        "kernel_seconds": seconds,
        "launches": sum(kernel.launches for kernel in found),
        "slowest": [described(kernel, seconds) for kernel in first],
        "others_on_slow_paths": [described(kernel, seconds) for kernel in slow],
    }


# -------------------------------------------------------------------------------------- memory


def memory(scale: Scale, names: tuple[str, ...]) -> Iterator[Part]:
    """The planner's peak beside the allocator's, of whole iterations, DeepSpeed included."""
    current = CurrentIterations(scale)
    for setup in names or DEFAULT_SETUPS:
        for build in MEMORY_BUILDS:
            for samples in scale.samples:
                name = f"{setup}, {build}, {samples} samples"
                yield Part(name, partial(compare_peaks, current, setup, build, samples))


def compare_peaks(
    current: CurrentIterations, setup: str, build: str, samples: int
) -> dict[str, Any]:
    """Bytes of tensors at most, predicted and allocated."""
    current.scale.require_gpu()
    chosen, device = current.setup(setup), current.scale.device
    config = config_of(chosen, BUILDS[build], samples, current.scale.overrides(chosen.number))
    training = config.stages[chosen.number].training
    one_gpu = Scaling(training.zero_stage, num_ranks=1, accumulates=False)
    predicted = find_peak(run_step(config, chosen.number), training, one_gpu).total
    iteration = current.of(setup, build).at(samples)
    iteration()  # kernels are compiled, the optimizer's state is there
    free_memory()
    torch.cuda.reset_peak_memory_stats(device)
    iteration()
    torch.cuda.synchronize(device)
    measured = torch.cuda.max_memory_allocated(device)
    return {
        "predicted_bytes": predicted,
        "allocated_bytes": measured,
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
        "predicted_over_allocated": predicted / measured,
    }
