"""A whole training iteration: which ones are compared, in which builds, and how each is measured.

An iteration is the paper's: two D updates and one G update, each of a micro-batch of its own. What
a loader would deliver is there already, nothing is communicated.

Builds:

- `fp32`: PyTorch alone, as the paper had it: fp32 without TF32, contiguous tensors, no folding;
- `bf16`: the same with bf16 activations, channels last;
- `compiled`: that with torch.compile of G's and D's forward passes;
- `ours`: this engine with the configuration's defaults, DeepSpeed included;
- `blocks`: ours, recomputing every residual block in the backward pass.

The first three are `benchmarks/plain.py`'s operators in the same networks, with PyTorch's own Adam
in place of DeepSpeed. `compiled` compiles anew for the second micro-batch, then for any size.

Memory: bytes that PyTorch's allocator has handed out at most, in all, weights and optimizer state
included; MB are 1e6 bytes. Samples per GPU are powers of two, because 512 is one. A GPU of "32 GB"
or "80 GB" is a V100's or H100's memory less `RESERVED_BYTES`; a larger GPU stands in for it by the
same count.
"""

import gc
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.plain import PlainOperators
from benchmarks.results import Attempt
from benchmarks.timing import measure, num_rounds, spread
from benchmarks.trainers import (
    SameClips,
    at_micro_batch,
    plain_engines,
    stage_builder,
    trainer_around,
)
from engine.configuration import Config, load_config
from engine.trainer.ranks import Ranks

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


class Paper(NamedTuple):
    """A line of the paper's Table 3."""

    samples: int
    megabytes: int
    seconds: float
    """Per iteration of 4 samples per GPU."""


class Setup(NamedTuple):
    """What is trained."""

    title: str
    file: str
    number: int
    overrides: tuple[str, ...]
    samples: int
    """Per GPU and pass, in the paper where it says."""
    paper: Paper | None = None


# x_l is free: read from a bank of samples drawn ahead, as real clips' f(x) is here.
_READ = "training.condition_on=data"

SETUPS = {
    "stage1": Setup(
        "stage 1 32x32/25", "kinetics600.yaml", 1, (), 4, Paper(4, 27897, 3.45)
    ),
    "stage2_6": Setup(
        "stage 2 128x128/6", "kinetics600.yaml", 2, ("variant=window3", _READ), 4
    ),
    "stage2_12": Setup(
        "stage 2 128x128/12", "kinetics600.yaml", 2, ("variant=window6", _READ), 4
    ),
    # As the paper trains it: x_l is generated for every update.
    "stage2_generated": Setup(
        "stage 2 128x128/12 and stage 1 for its x_l", "kinetics600.yaml", 2, ("variant=window6",),
        4, Paper(4, 29073, 3.2),
    ),
    "dvdgan_12": Setup("DVD-GAN 128x128/12", "dvdgan.yaml", 1, ("variant=frames12",), 4),
    "dvdgan_50": Setup(
        "DVD-GAN 128x128/50", "dvdgan.yaml", 1, ("variant=frames48", "stages.1.num_frames=50"),
        1, Paper(1, 32203, 4 * 2.975),
    ),
}  # fmt: skip

PAPER_GPUS, PAPER_SAMPLES, ITERATIONS = 128, 4, 300_000
"""On so many GPUs each of the paper's 300 000 iterations is of 4 samples per GPU, 512 in all."""


class Build(NamedTuple):
    """How it is trained."""

    title: str
    plain: bool
    overrides: tuple[str, ...] = ()
    compiled: bool = False


BUILDS = {
    "fp32": Build("plain fp32", True, ("training.precision=fp32",)),
    "bf16": Build("plain bf16", True),
    "compiled": Build("plain bf16, torch.compile", True, compiled=True),
    "ours": Build("this engine", False),
    "blocks": Build("this engine, blocks recomputed", False, ("training.checkpointing=blocks",)),
}

_MIB = 1 << 20
RESERVED_BYTES = 1536 * _MIB
"""For the CUDA context, libraries' workspaces and what fragmentation costs."""
USABLE_BYTES = {
    "32 GB": 32510 * _MIB - RESERVED_BYTES,
    "80 GB": 81559 * _MIB - RESERVED_BYTES,
}


def config_of(
    setup: Setup, build: Build, micro_batch: int, overrides: tuple[str, ...] = ()
) -> Config:
    """One micro-batch per update: accumulation repeats the same work."""
    batch = f"training.micro_batch={micro_batch}", f"training.global_batch={micro_batch}"
    zero = ("training.zero_stage=0",) if build.plain else ()
    every = (*setup.overrides, *build.overrides, *overrides, *batch, *zero)
    return load_config(CONFIGS / setup.file, every)


def operators_of(build: Build) -> PlainOperators | None:
    """What the networks run on in place of `kernels`; None for the engine's own."""
    if not build.plain:
        return None
    in_fp32 = "training.precision=fp32" in build.overrides
    return PlainOperators(channels_last=not in_fp32, compiled=build.compiled)


Iteration = Callable[[], object]


def make_iteration(
    setup: Setup, build: Build, ranks: Ranks, overrides: tuple[str, ...] = ()
) -> Callable[[int], Iteration]:
    """Builds the networks once. Returns a function: micro-batch → one iteration of it."""
    config = config_of(setup, build, setup.samples, overrides)
    builder = stage_builder(config, setup.number, ranks)
    operators = operators_of(build)
    if operators is None:
        with ranks.device:
            trainer = builder.trainer(SameClips(config, setup.number, ranks.device))
    else:
        engines = plain_engines(builder)
        if build.compiled:
            torch._dynamo.reset()
            for engine in engines:
                engine.module.compile()
        trainer = trainer_around(builder, *engines)

    def at(micro_batch: int) -> Iteration:
        config = config_of(setup, build, micro_batch, overrides)
        resized = at_micro_batch(builder, config, trainer)

        def iteration() -> None:
            with nullcontext() if operators is None else operators.installed():
                resized.train_step()

        return iteration

    return at


# ------------------------------------------------------------------------------- on a GPU


class Search(NamedTuple):
    """What was tried, from the fewest samples up."""

    attempts: list[Attempt]
    exhausted: bool
    """Whether the last one was followed by one that did not fit."""

    def at(self, samples: int) -> Attempt | None:
        """None where it was not tried or did not fit."""
        return next((a for a in self.attempts if a.samples == samples), None)

    @property
    def best(self) -> Attempt | None:
        """The least time per sample."""
        timed = [a for a in self.attempts if a.seconds is not None]
        return min(timed, key=lambda a: a.seconds.median / a.samples, default=None)  # type: ignore[union-attr]

    def fits(self, usable_bytes: int) -> int | None:
        """Most samples that stay below; None where larger ones were not tried."""
        below = [a.samples for a in self.attempts if (a.peak_bytes or 0) <= usable_bytes]
        if len(below) == len(self.attempts) and not self.exhausted:
            return None
        return max(below, default=0)


def search(
    at: Callable[[int], Iteration],
    device: torch.device,
    *,
    first: int,
    usable_bytes: int,
    seconds: float,
    most_samples: int = 512,
) -> Search:
    """Double the micro-batch until it does not fit, into the card or into `usable_bytes`."""
    attempts: list[Attempt] = []
    samples = first
    while samples <= most_samples:
        attempt = try_samples(at, samples, device, seconds)
        if attempt is None:
            return Search(attempts, exhausted=True)
        if (attempt.peak_bytes or 0) > usable_bytes:
            return Search(attempts, exhausted=True)
        attempts.append(attempt)
        samples *= 2
    return Search(attempts, exhausted=False)


def try_samples(
    at: Callable[[int], Iteration], samples: int, device: torch.device, seconds: float
) -> Attempt | None:
    """Measure at one micro-batch, in `seconds` or three iterations; None where it does not fit."""
    try:
        iteration = at(samples)
        iteration()  # compilation, autotuning, the optimizer's state
        torch.cuda.reset_peak_memory_stats(device)
        once = measure(iteration, device)
        taken = [measure(iteration, device) for _ in range(num_rounds(once, seconds, 2, 20))]
        peak = torch.cuda.max_memory_allocated(device)
        return Attempt(samples=samples, seconds=spread([once, *taken]), peak_bytes=peak)
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        free_memory()


def free_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def sides(
    setup: Setup, names: dict[str, str], ranks: Ranks, overrides: tuple[str, ...], samples: int
) -> dict[str, Any]:
    """Iterations of several builds: side → build's name."""
    return {
        side: make_iteration(setup, BUILDS[name], ranks, overrides)(samples)
        for side, name in names.items()
    }
