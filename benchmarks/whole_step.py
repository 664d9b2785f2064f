"""How a whole training iteration is run, counted and measured; `setups` says which.

Memory: bytes that PyTorch's allocator has handed out at most, in all, weights and optimizer state
included; MB are 1e6 bytes. Samples per GPU are powers of two, because 512 is one. A GPU of "32 GB"
or "80 GB" is a V100's or H100's memory less `RESERVED_BYTES`; a larger GPU stands in for it by the
same count. torch.compile compiles for the first micro-batch, then anew for any size.
"""

import gc
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

import kernels
from benchmarks.correctness import check_networks
from benchmarks.plain import PlainOperators
from benchmarks.results import Attempt, WholeStep
from benchmarks.setups import (
    BUILDS,
    NODE_GPUS,
    SETUPS,
    USABLE_BYTES,
    Build,
    Setup,
    config_of,
    few_channels,
    step_of,
)
from benchmarks.timing import sample, spread
from benchmarks.trainers import make_engines, stage_builder, trainer_around
from engine.errors import UserError
from engine.planning.meta_step import Step, run_step
from engine.planning.rank_memory import VALUE_BYTES, Scaling, find_peak
from engine.trainer.acceleration import accelerate
from engine.trainer.ranks import Ranks
from engine.trainer.recorded_passes import recorded_bytes


def operators_of(build: Build) -> Any:
    """What the networks run on: `kernels`, or in a plain build PyTorch alone."""
    if not build.plain:
        return kernels
    in_fp32 = "training.precision=fp32" in build.overrides
    return PlainOperators(channels_last=not in_fp32)


class Iterations:
    """A build of a setup: its networks, initialised once, and iterations of any micro-batch."""

    def __init__(
        self, setup: Setup, build: Build, ranks: Ranks, overrides: tuple[str, ...] = ()
    ) -> None:
        self._setup, self._build, self._overrides = setup, build, overrides
        self.config = config_of(setup, build, setup.samples, overrides)
        self._operators = operators_of(build)
        self._builder = stage_builder(self.config, setup.number, ranks, self._operators)
        engines = make_engines(self._builder, plain=build.plain, operators=self._operators)
        self.trainer = trainer_around(self._builder, *engines)

    def at(self, micro_batch: int) -> Callable[[], Any]:
        """One iteration of so many samples."""
        config = config_of(self._setup, self._build, micro_batch, self._overrides)
        builder, trained = replace(self._builder, config=config), self.trainer
        return trainer_around(builder, trained.g_engine, trained.d_engine).train_step

    def close(self) -> None:
        """Let go of the networks, which DeepSpeed's hooks would keep alive for ever."""
        if not self._build.plain:
            self.trainer.g_engine.destroy()
            self.trainer.d_engine.destroy()

    def accelerate(self) -> None:
        """From now on passes are compiled or replayed, where the build says so."""
        if not self._build.plain:
            stage = self.config.stages[self._setup.number]
            accelerate(stage, self._builder.ranks, self.trainer, self._builder.previous)
        elif self._build.compiled:
            torch._dynamo.reset()
            self._operators.compile()
            for engine in (self.trainer.g_engine, self.trainer.d_engine):
                engine.module.compile()

    def check(self, *, channels_last: bool = True) -> None:
        """This engine's networks compute what the plain ones do. Raises Refused."""
        plain = PlainOperators(channels_last=channels_last)
        networks = self.trainer.g_engine.module, self.trainer.d_engine.module
        check_networks(self.trainer, self.config, partial(plain.handed_to, *networks))


# ----------------------------------------------------------------------------- on a CPU

REDUCED_CHANNELS = 4
REDUCED_SIDES = {
    "ours": "ours",
    "contiguous": "fp32",
    "channels last": "bf16",  # in fp32 here, as all of them
    "compiled": "compiled",
}
"""Side of a reduced case → build."""


def reduced(setup: Setup, build: Build, ranks: Ranks) -> Iterations:
    """A setup at a thirty-second of its channels, in fp32, for one sample."""
    overrides = *few_channels(setup.number, REDUCED_CHANNELS), "training.precision=fp32"
    iterations = Iterations(setup._replace(samples=1), build, ranks, overrides)
    iterations.accelerate()
    return iterations


# ---------------------------------------------------------------------- on the meta device


class Counted(NamedTuple):
    """An iteration that was not run."""

    samples: int
    tflop_per_sample: float
    peak_bytes: int


def count_iteration(
    setup: Setup, build: Build, samples: int, overrides: tuple[str, ...] = ()
) -> Counted:
    """FLOPs and peak memory of one iteration on a GPU.

    The engine's builds share their optimizer state with `NODE_GPUS` ranks (ZeRO-1) and hold what
    DeepSpeed holds besides; the plain ones have PyTorch's Adam.
    """
    config, operators = config_of(setup, build, samples, overrides), operators_of(build)
    step = run_step(config, setup.number, operators=operators)
    training = config.stages[setup.number].training
    d_flops, g_flops = (sum(update.flops.values()) for update in step.updates.values())
    flops = training.discriminator_steps * d_flops + g_flops
    if build.plain:
        peak_bytes = plain_peak_bytes(step)
    else:
        scaling = Scaling(training.zero_stage, num_ranks=NODE_GPUS, accumulates=False)
        peak_bytes = find_peak(step, training, scaling).total
    return Counted(samples, tflop_per_sample=flops / samples / 1e12, peak_bytes=peak_bytes)


def plain_peak_bytes(step: Step) -> int:
    """With Adam's two moments of every weight; gradients are freed after each update."""
    moments = 2 * VALUE_BYTES * sum(step.generator_sizes + step.discriminator_sizes)
    most = max(
        most + gradients
        for update in step.updates.values()
        for (_, gradients), most in update.most.items()
    )
    return step.parameter_bytes + moments + most


def largest_that_fits(first: Counted, second: Counted, usable_bytes: int) -> int:
    """The most samples, a power of two or 0, on the line through two counts.

    Memory is the largest of several lines in the number of samples, so this is exact where one of
    them is the largest throughout.
    """
    slope = (second.peak_bytes - first.peak_bytes) / (second.samples - first.samples)
    samples, most = 1, 0
    while first.peak_bytes + slope * (samples - first.samples) <= usable_bytes:
        most, samples = samples, 2 * samples
    return most


def counted_step(name: str, build_name: str, *, search: bool = True) -> WholeStep:
    """The record of a setup in a build. With `search` also how many samples fit."""
    setup, build = SETUPS[name], BUILDS[build_name]
    usual = count_iteration(setup, build, setup.samples)
    fits: dict[str, int | None] = dict.fromkeys(USABLE_BYTES)
    if search:
        more = count_iteration(setup, build, 8 * setup.samples)
        fits = {gpu: largest_that_fits(usual, more, size) for gpu, size in USABLE_BYTES.items()}
    return WholeStep(
        setup=name,
        build=build_name,
        how="counted",
        tflop_per_sample=usual.tflop_per_sample,
        usual=Attempt(samples=usual.samples, seconds=None, peak_bytes=usual.peak_bytes),
        fits=fits,
    )


# ------------------------------------------------------------------------------- on a GPU

MOST_SAMPLES = 512  # the whole batch on one GPU


def search(
    attempt: Callable[[int], Attempt | None],
    *,
    first: int,
    card_bytes: int,
    usable_bytes: int,
    most_samples: int = MOST_SAMPLES,
) -> tuple[list[Attempt], int | None]:
    """Double the samples until they do not fit, into the card (None) or into `usable_bytes`.

    Returns what was tried, and the memory into which the next size did not fit, None where none was
    too large. What else stops a larger size, such as PyTorch's upsampling at 2^31 values, is a
    warning.
    """
    attempts: list[Attempt] = []
    samples = first
    while samples <= most_samples:
        try:
            tried = attempt(samples)
        except RuntimeError as error:
            if not attempts:
                raise
            warnings.warn(f"{samples} samples: {error}", stacklevel=2)
            break
        if tried is None:
            return attempts, min(card_bytes, usable_bytes)
        if (tried.peak_bytes or 0) > usable_bytes:
            return attempts, usable_bytes
        attempts.append(tried)
        samples *= 2
    return attempts, None


def try_samples(
    iterations: Iterations, samples: int, device: torch.device, seconds: float
) -> Attempt | None:
    """Measure at one micro-batch, for about `seconds`; None where it does not fit into the card."""
    try:
        iteration = iterations.at(samples)
        iteration()  # compilation, autotuning, the optimizer's state
        torch.cuda.reset_peak_memory_stats(device)
        taken = sample(iteration, device, seconds, least=3, most=21)
        peak = torch.cuda.max_memory_allocated(device) + recorded_bytes(device)
        return Attempt(samples=samples, seconds=spread(taken), peak_bytes=peak)
    except torch.cuda.OutOfMemoryError:
        return None


def free_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    torch.cuda.empty_cache()


def executed_tflop(iteration: Callable[[], None]) -> float:
    """Of one iteration, as PyTorch counts it."""
    with FlopCounterMode(display=False) as counter:
        iteration()
    return counter.get_total_flops() / 1e12


def measured_step(
    name: str, build_name: str, ranks: Ranks, matmul_tflop_per_s: float, *, seconds: float = 2.0
) -> WholeStep:
    """The record of a setup in a build, on a GPU. Raises UserError where nothing fits.

    Raises Refused where this engine's networks do not compute what the plain ones do, RuntimeError
    where an earlier case still holds memory, which this one would lack.
    """
    setup, build, device = SETUPS[name], BUILDS[build_name], ranks.device
    free_memory()
    if torch.cuda.memory_allocated(device) > 1 << 30:
        raise RuntimeError("an earlier case still holds memory: run this one in a process alone")
    with closing(Iterations(setup, build, ranks)) as iterations:
        if not build.plain:
            iterations.check()
        tflop = executed_tflop(iterations.at(1))
        iterations.accelerate()

        def attempt(samples: int) -> Attempt | None:
            free_memory()
            return try_samples(iterations, samples, device, seconds)

        attempts, limit_bytes = search(
            attempt,
            first=setup.samples,
            card_bytes=torch.cuda.get_device_properties(device).total_memory,
            usable_bytes=max(USABLE_BYTES.values()),
            most_samples=setup.samples if build.usual_samples_only else MOST_SAMPLES,
        )
    if not attempts:
        raise UserError(f"{setup.samples} samples of {setup.title} do not fit, {build.title}")
    return step_of(name, build_name, attempts, tflop, matmul_tflop_per_s, limit_bytes)
