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
from benchmarks.session import measure_rates
from benchmarks.setups import BUILDS, SETUPS, Scale, config_of
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


def steps(scale: Scale, names: tuple[str, ...]) -> Iterator[Part]:
    """Of each setup: G and D compute what plain PyTorch's do; one iteration; where the host waits.

    Then iterations of some numbers of samples, with and without CUDA graphs.
    """
    current = CurrentIterations(scale)
    yield Part("rates", lambda: {"kind": "rates"} | measure_rates(scale.device).model_dump())
    for setup in names or DEFAULT_SETUPS:
        yield Part(f"{setup}: networks as plain ones", partial(current.check, setup))
        yield Part(f"{setup}: an iteration", partial(current.seconds, setup))
        yield Part(f"{setup}: waits", partial(current.waits, setup))
        yield Part(f"{setup}: FLOPs", partial(current.flops, setup))
        for build in STEP_BUILDS:
            for samples in scale.samples:
                name, case = f"{setup}, {build}, {samples} samples", (setup, build, samples)
                yield Part(name, partial(current.timed, *case))
                yield Part(f"{name}: kernels", partial(current.kernels, *case))


def profile(scale: Scale, names: tuple[str, ...]) -> Iterator[Part]:
    """The kernels that an iteration of the most samples of the scale spends most of its time in."""
    current, samples = CurrentIterations(scale), scale.samples[-1]
    for setup in names or DEFAULT_SETUPS:
        yield Part(f"{setup}, {samples} samples", partial(current.slowest, setup, samples))


def memory(scale: Scale, names: tuple[str, ...]) -> Iterator[Part]:
    """The planner's peak beside the allocator's, of whole iterations, DeepSpeed included."""
    current = CurrentIterations(scale)
    for setup in names or DEFAULT_SETUPS:
        for build in MEMORY_BUILDS:
            for samples in scale.samples:
                name, case = f"{setup}, {build}, {samples} samples", (setup, build, samples)
                yield Part(name, partial(current.peaks, *case))


class CurrentIterations:
    """The networks of a setup in a build, and what is found out of them.

    Asking for others lets go of them. They are in a job of one rank, which is connected for as long
    as the process is.
    """

    def __init__(self, scale: Scale) -> None:
        self._scale, self._device = scale, scale.device
        self._ranks = Ranks(rank=0, world_size=1, local_rank=0, device=scale.device)
        self._ranks.connect()
        self._key: tuple[str, str] | None = None
        self._iterations: Iterations | None = None

    def of(self, setup: str, build: str = "ours") -> Iterations:
        """As they were left, or initialised at the scale."""
        if self._key != (setup, build) or self._iterations is None:
            if self._iterations is not None:
                self._iterations.close()
            self._key = self._iterations = None
            if self._device.type == "cuda":
                free_memory()
            chosen = SETUPS[setup]._replace(samples=self._scale.samples[0])
            overrides = self._scale.overrides(chosen.number)
            made = Iterations(chosen, BUILDS[build], self._ranks, overrides)
            made.accelerate()
            self._key, self._iterations = (setup, build), made
        return self._iterations

    def check(self, setup: str) -> str:
        """Values and gradients of G and D. Raises Refused where more than rounding differs."""
        self.of(setup).check()
        return "as plain PyTorch, to rounding"

    def seconds(self, setup: str) -> dict[str, float]:
        """Of the first iteration, kernels compiled among them, and of the second.

        Losses are finite.
        """
        iteration = self.of(setup).at(self._scale.samples[0])
        return {name: self._wall_seconds(iteration) for name in ("first", "second")}

    def waits(self, setup: str) -> dict[str, int]:
        """How often the host waits in an iteration, by the line that makes it.

        PyTorch tells of its own synchronizing operators, not of calls of synchronize, nor of copies
        that do not block and come from pageable memory.
        """
        iteration = self._warm(setup, self._scale.samples[0])
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                iteration()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        told = [w for w in caught if "synchroniz" in str(w.message)]
        return dict(Counter(f"{Path(w.filename).name}:{w.lineno}" for w in told))

    def flops(self, setup: str) -> dict[str, Any]:
        """Executed FLOPs of an iteration of one sample."""
        tflop = executed_tflop(self.of(setup).at(1))
        return {"kind": "flops", "setup": setup, "tflop_per_sample": tflop}

    def timed(self, setup: str, build: str, samples: int) -> dict[str, Any]:
        """Seconds by the GPU's clock, and peak memory. Raises RuntimeError where it is too much."""
        self._scale.require_gpu()
        iterations = self.of(setup, build)
        attempt = try_samples(iterations, samples, self._device, SECONDS_PER_SIZE)
        if attempt is None:
            raise RuntimeError(f"{samples} samples do not fit")
        return {"kind": "iteration", "setup": setup, "build": build} | attempt.model_dump()

    def kernels(self, setup: str, build: str, samples: int) -> dict[str, Any]:
        """Wall time of an iteration in a row of several, and what its kernels take together.

        Where they leave a gap, the GPU has waited for its host.
        """
        iteration = self._warm(setup, samples, build, rounds=1)
        seconds = self._wall_seconds(iteration, ROUNDS_OF_WALL_TIME)
        found = kernels_of(iteration)
        kernel_seconds = sum(kernel.seconds for kernel in found)
        return {
            "wall_seconds": seconds,
            "kernel_seconds": kernel_seconds,
            "launches": sum(kernel.launches for kernel in found),
            "idle_share": 1 - kernel_seconds / seconds,
        }

    def slowest(self, setup: str, samples: int) -> dict[str, Any]:
        """The first `NUM_SHOWN` kernels, and every other one whose name tells of a slow path."""
        found = kernels_of(self._warm(setup, samples))
        seconds = sum(kernel.seconds for kernel in found)
        first, others = found[:NUM_SHOWN], found[NUM_SHOWN:]
        slow = [kernel for kernel in others if slow_path(kernel.name)]
        return {
            "kernel_seconds": seconds,
            "launches": sum(kernel.launches for kernel in found),
            "slowest": [described(kernel, seconds) for kernel in first],
            "others_on_slow_paths": [described(kernel, seconds) for kernel in slow],
        }

    def peaks(self, setup: str, build: str, samples: int) -> dict[str, Any]:
        """Bytes of tensors at most, predicted and allocated."""
        chosen, device = SETUPS[setup], self._device
        iteration = self._warm(setup, samples, build, rounds=1)
        config = config_of(chosen, BUILDS[build], samples, self._scale.overrides(chosen.number))
        training = config.stages[chosen.number].training
        one_gpu = Scaling(training.zero_stage, num_ranks=1, accumulates=False)
        predicted = find_peak(run_step(config, chosen.number), training, one_gpu).total
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

    def _warm(
        self, setup: str, samples: int, build: str = "ours", rounds: int = 2
    ) -> Callable[[], None]:
        """An iteration on a GPU, after some: kernels are compiled, algorithms chosen."""
        self._scale.require_gpu()
        iteration = self.of(setup, build).at(samples)
        for _ in range(rounds):
            iteration()
        return iteration

    def _wall_seconds(self, run: Callable[[], object], rounds: int = 1) -> float:
        """Of one round, until the device has nothing left to do."""
        synchronize = torch.cuda.synchronize if self._device.type == "cuda" else lambda: None
        synchronize()
        began = time.perf_counter()
        for _ in range(rounds):
            run()
        synchronize()
        return (time.perf_counter() - began) / rounds
