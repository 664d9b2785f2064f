"""Dummy passes, which fix a trained cascade's norm statistics before it samples.

The paper runs 200 of them at the length that it generates. Statistics do not depend on what is then
sampled, so they are kept: beside the samples, and in an exported cascade.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from engine.configuration import Config
from engine.models.cascade import GeneratorCascade
from engine.trainer.fakes import LatentSource
from engine.trainer.previous import load_cascade
from engine.trainer.ranks import derived_seed
from engine.trainer.standing_statistics import fix_standing_statistics

BATCH_SIZE = 8
MOST_UNROLLED = 4
"""The longest dummy passes, in training clips."""
_PASSES = "sampling passes"  # a stream of random numbers


class TrainedCascade(Protocol):
    """What sampling needs of a checkpoint or of an exported cascade."""

    @property
    def path(self) -> Path:
        """Its folder."""
        ...

    @property
    def step(self) -> int:
        """Generator updates done."""
        ...

    @property
    def stage_number(self) -> int:
        """The number of the last stage."""
        ...

    @property
    def classes(self) -> list[str]:
        """The classes' names, by label; empty where the data set named none."""
        ...

    @property
    def class_counts(self) -> list[int]:
        """Training videos per class; empty without classes."""
        ...

    @property
    def frames_per_second(self) -> float:
        """Of the videos that it makes."""
        ...

    @property
    def digest(self) -> str:
        """Tells its weights from all others."""
        ...

    @property
    def passes(self) -> "DummyPasses | None":
        """Those whose statistics it brings; None: it brings none."""
        ...

    def config(self) -> Config:
        """The configuration it was trained with."""
        ...

    def generators(self) -> dict[int, dict[str, Tensor]]:
        """State dicts of the generators, by stage. Raises UserError when one cannot be read."""
        ...


@dataclass(frozen=True)
class DummyPasses:
    """What statistics are taken of; equal ones give a network equal statistics."""

    num_frames: int
    """Of the videos that are made."""
    num_passes: int
    batch_size: int
    """Clips per pass."""
    sigma: float
    """Standard deviation of z."""
    seed: int
    windows: bool = False
    """Whether each stage after the first makes a window, as in training, and not a whole video."""


def clip_length(trained: TrainedCascade) -> int:
    """Frames that a stage-1 clip of training's length is unrolled to."""
    config = trained.config()
    return config.stages[1].num_frames * config.unrolling(trained.stage_number)


def choose_passes(
    trained: TrainedCascade,
    *,
    num_frames: int,
    sigma: float,
    seed: int,
    num_passes: int | None = None,
    batch_size: int | None = None,
    statistics_frames: int | None = None,
    windows: bool = False,
) -> DummyPasses:
    """Those for videos of `num_frames`.

    They are as long as what is generated (paper), up to `MOST_UNROLLED` times the training clip: a
    pass has all frames in memory, for a whole batch. A longer video uses their statistics as
    `engine.models.chunks.statistics_rows` says. Their number is the configuration's by default.

    An exported cascade's own, whatever their length and seed, if they are of this `sigma` and
    nothing else is asked for.
    """
    asked = num_passes, batch_size, statistics_frames, windows or None
    if trained.passes is not None and trained.passes.sigma == sigma and asked == (None,) * 4:
        return trained.passes
    most = MOST_UNROLLED * clip_length(trained)
    training = trained.config().stages[trained.stage_number].training
    return DummyPasses(
        num_frames=statistics_frames or min(num_frames, most),
        num_passes=num_passes or training.norm_statistics_passes,
        batch_size=batch_size or BATCH_SIZE,
        sigma=sigma,
        seed=seed,
        windows=windows,
    )


def run_passes(cascade: GeneratorCascade, trained: TrainedCascade, passes: DummyPasses) -> None:
    """Fix the norms.

    Decided: the passes draw z with the σ that is sampled with, as BigGAN does for truncation;
    statistics of σ = 1 do not fit activations of σ = 0.5. Decided: they draw classes as often as
    the data has them, as training does; embeddings that were never trained shall not count.
    """
    config, stages = cascade.config, list(cascade.generators)
    clip_frames = -(-passes.num_frames // config.unrolling(len(stages)))
    latents = LatentSource(
        config,
        trained.class_counts,
        derived_seed(_PASSES, passes.seed),
        next(cascade.parameters()).device,
        sigma=passes.sigma,
    )

    def run_stage(number: int, zs: list[Tensor], labels_B: Tensor | None) -> None:
        if passes.windows:
            cascade.sample_previous(number + 1, zs, labels_B, latents.random)
            return
        to_it = GeneratorCascade(stages[:number], config)
        to_it.generate(zs, labels_B, clip_frames * config.unrolling(number))

    with tqdm(total=passes.num_passes * len(stages), desc="norm statistics", unit="pass") as bar:
        fix_standing_statistics(
            cascade,
            latents=latents,
            batch_size=passes.batch_size,
            num_passes=passes.num_passes,
            run_stage=run_stage,
            on_pass=bar.update,
        )


def load_trained(trained: TrainedCascade, device: torch.device) -> GeneratorCascade:
    """Its generators on a device, ready to sample but for the statistics."""
    return load_cascade(trained.config(), trained.generators(), device).freeze()
