"""Which training iterations are compared, in which builds.

An iteration is the paper's: two D updates and one G update, each of a micro-batch of its own. What
a loader would deliver is there already, nothing is communicated.

Builds:

- `fp32`: PyTorch alone, as the paper had it: fp32 without TF32, contiguous tensors, no folding;
- `bf16`: the same with bf16 activations, channels last;
- `compiled`: that with torch.compile of G's and D's forward passes;
- `ours`: this engine with the configuration's defaults, DeepSpeed included;
- `graphs`: ours, replaying passes without gradients as CUDA graphs; at the paper's samples only,
  where the GPU may wait for its host (a recording holds memory, for every size its own);
- `blocks`: ours, recomputing every residual block in the backward pass.

The first three are the operators of benchmarks/plain.py in the same networks, with PyTorch's own
Adam in place of DeepSpeed.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.results import Attempt, WholeStep
from engine.configuration import Config, load_config
from engine.planning.paper import TABLE_3, MeasuredInPaper

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
KINETICS = CONFIGS / "kinetics600.yaml"


class Setup(NamedTuple):
    """What is trained."""

    title: str
    file: str
    number: int
    overrides: tuple[str, ...]
    samples: int  # per GPU and pass, in the paper where it says
    paper: MeasuredInPaper | None = None  # the line of Table 3


# x_l is free: read from a bank of samples drawn ahead, as real clips' f(x) is here.
_READ = "training.condition_on=data", "stages.2.training.sample_bank=null"
_GENERATED = ("stages.2.training.sample_bank=null",)

SETUPS = {
    "stage1": Setup(
        "stage 1 32x32/25", "kinetics600.yaml", 1, (), 4, TABLE_3[32, 25]
    ),
    "stage2_6": Setup(
        "stage 2 128x128/6", "kinetics600.yaml", 2, ("variant=window3", *_READ), 4
    ),
    "stage2_12": Setup(
        "stage 2 128x128/12", "kinetics600.yaml", 2, ("variant=window6", *_READ), 4
    ),
    # As the paper trains it: x_l is generated for every update.
    "stage2_generated": Setup(
        "stage 2 128x128/12 and stage 1 for its x_l", "kinetics600.yaml", 2,
        ("variant=window6", *_GENERATED), 4, TABLE_3[128, 12],
    ),
    "dvdgan_12": Setup("DVD-GAN 128x128/12", "dvdgan.yaml", 1, ("variant=frames12",), 4),
    "dvdgan_50": Setup(
        "DVD-GAN 128x128/50", "dvdgan.yaml", 1, ("variant=frames48", "stages.1.num_frames=50"),
        1, TABLE_3[128, 50],
    ),
}  # fmt: skip

PAPER_GPUS, PAPER_SAMPLES, ITERATIONS = 128, 4, 300_000
"""On so many GPUs each of the paper's 300 000 iterations is of 4 samples per GPU, 512 in all."""
NODE_GPUS = 8


class Build(NamedTuple):
    """How it is trained."""

    title: str
    plain: bool
    overrides: tuple[str, ...] = ()
    compiled: bool = False
    usual_samples_only: bool = False


BUILDS = {
    "fp32": Build("plain fp32", True, ("training.precision=fp32",)),
    "bf16": Build("plain bf16", True),
    "compiled": Build("plain bf16, torch.compile", True, compiled=True),
    "ours": Build("this engine", False),
    "graphs": Build("this engine, CUDA graphs", False, ("training.acceleration=cuda_graphs",),
                    usual_samples_only=True),
    "blocks": Build("this engine, blocks recomputed", False, ("training.checkpointing=blocks",)),
}  # fmt: skip

_MIB = 1 << 20
RESERVED_BYTES = 3 * 1024 * _MIB
"""For the CUDA context, libraries' workspaces and what fragmentation costs."""
USABLE_BYTES = {
    "32 GB": 32510 * _MIB - RESERVED_BYTES,
    "80 GB": 81559 * _MIB - RESERVED_BYTES,
}


def few_channels(num_stages: int, channels: int = 4) -> tuple[str, ...]:
    """Overrides that make networks small and leave them as many operators as ever."""
    return tuple(
        f"stages.{number}.{network}.channels={channels}"
        for number in range(1, num_stages + 1)
        for network in ("generator", "discriminators")
    )


def config_of(
    setup: Setup, build: Build, micro_batch: int, overrides: tuple[str, ...] = ()
) -> Config:
    """One micro-batch per update: accumulation repeats the same work."""
    batch = f"training.micro_batch={micro_batch}", f"training.global_batch={micro_batch}"
    zero = ("training.zero_stage=0",) if build.plain else ()
    every = (*setup.overrides, *build.overrides, *overrides, *batch, *zero)
    return load_config(CONFIGS / setup.file, every)


def step_of(
    setup: str,
    build: str,
    attempts: Sequence[Attempt],
    tflop_per_sample: float,
    matmul_tflop_per_s: float | None,
    limit_bytes: int | None = None,
) -> WholeStep:
    """The record of a setup in a build, from the sizes that were run. `limit_bytes` as below."""
    tried = sorted(attempts, key=lambda attempt: attempt.samples)
    best = min(tried, key=lambda attempt: attempt.seconds_per_sample or math.inf)
    return WholeStep(
        setup=setup,
        build=build,
        how="measured",
        tflop_per_sample=tflop_per_sample,
        usual=tried[0],
        best=None if BUILDS[build].usual_samples_only else best,
        fits={gpu: most_that_fits(tried, size, limit_bytes) for gpu, size in USABLE_BYTES.items()},
        matmul_tflop_per_s=matmul_tflop_per_s,
    )


def most_that_fits(
    attempts: Sequence[Attempt], usable_bytes: int, limit_bytes: int | None = None
) -> int | None:
    """Most samples, a power of two or 0; None where twice as many were not tried.

    `limit_bytes`: the memory into which twice the largest attempt did not fit, if that was tried.
    """
    fitting = [a.samples for a in attempts if (a.peak_bytes or 0) <= usable_bytes]
    most = max(fitting, default=0)
    twice_is_too_large = 2 * most in {attempt.samples for attempt in attempts} - set(fitting)
    return most if twice_is_too_large or (limit_bytes or 0) >= usable_bytes else None


# ------------------------------------------------------- the paper's sizes, or whether it runs


class Scale(NamedTuple):
    """Sizes and device of a call of benchmarks/first_hour."""

    device: torch.device
    small: bool

    @property
    def samples(self) -> tuple[int, ...]:
        """Of whole iterations, from the paper's samples per GPU up."""
        return (1, 2) if self.small else (4, 16, 32)

    def require_gpu(self) -> None:
        """Raises RuntimeError without one."""
        if self.device.type != "cuda":
            raise RuntimeError("there is no CUDA device")

    def overrides(self, num_stages: int) -> tuple[str, ...]:
        """Of a configuration's first stages, as with `--set`."""
        precision = "bf16" if self.device.type == "cuda" else "fp32"
        small = *few_channels(num_stages), f"training.precision={precision}"
        return small if self.small else ()

    def kinetics(self, micro_batch: int) -> Config:
        """configs/kinetics600.yaml for so many samples."""
        batch = f"training.micro_batch={micro_batch}", f"training.global_batch={micro_batch}"
        return load_config(KINETICS, (*self.overrides(2), *batch))


def scale_here(*, small: bool) -> Scale:
    """On the GPU; small ones on the CPU where there is none. Raises RuntimeError for others."""
    if torch.cuda.is_available():
        return Scale(torch.device("cuda", 0), small)
    if not small:
        raise RuntimeError("the paper's sizes need a CUDA device; --small runs on a CPU")
    return Scale(torch.device("cpu"), small)
