"""A tiny stage 1 that trains on four clips comes measurably closer to them."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from small_runs import Tiny
from torch import Tensor

from engine.trainer.networks import StageBuilder
from engine.trainer.ranks import Ranks
from engine.video.dataset import describe, open_dataset


class Distances(NamedTuple):
    """Root mean squares over pixels, channels and time steps, in units of [-1, 1] pixel values.

    Three numbers that an untrained generator gets wrong. No metric of quality: a generator can be
    good in all of them and show nothing, see engine/clip_figures.py.
    """

    mean: float
    """Of the difference of the videos' per-pixel means over the batch."""
    variance: float
    """Of the difference of their per-pixel variances over the batch."""
    motion: float
    """Of the difference of the per-pixel means of |x_{t+1} - x_t|."""


def learning_distances(real_BTCHW: Tensor, fake_BTCHW: Tensor) -> Distances:
    statistics = zip(_statistics(real_BTCHW), _statistics(fake_BTCHW), strict=True)
    return Distances(*((real - fake).square().mean().sqrt().item() for real, fake in statistics))


def _statistics(video_BTCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        video_BTCHW.mean(dim=0),
        video_BTCHW.var(dim=0, correction=0),  # also of a single video
        video_BTCHW.diff(dim=1).abs().mean(dim=0),
    )


def test_distances_by_hand() -> None:
    """Two videos of two frames of one pixel: 0 → 1 and 2 → 5; against one that stands at 3."""
    real = torch.tensor([[0.0, 1.0], [2.0, 5.0]]).reshape(2, 2, 1, 1, 1)
    fake = torch.full((1, 2, 1, 1, 1), 3.0)
    distances = learning_distances(real, fake)
    # Means 1 and 3, variances 1 and 4, motion (1 + 3) / 2.
    assert distances.mean == pytest.approx(((2**2 + 0**2) / 2) ** 0.5)
    assert distances.variance == pytest.approx(((1**2 + 4**2) / 2) ** 0.5)
    assert distances.motion == pytest.approx(2.0)
    assert learning_distances(real, real) == (0.0, 0.0, 0.0)


@pytest.mark.long
def test_training_brings_samples_closer_to_the_data(
    tiny: Tiny, ranks: Ranks, tmp_path: Path
) -> None:
    """300 steps on four clips, one per class, of 8x8 pixels and four frames each.

    Measured, distances after training as parts of those before it (mean, variance, motion), for
    seeds 0 to 5: .18 .20 .60, .11 .22 .60, .27 .21 .64, .13 .17 .67, .10 .17 .57, .15 .19 .65.
    The thresholds lie half-way from the worst of them to no change at all, or closer.
    """
    config = tiny.config(
        f"data.path={tmp_path / 'four clips'}",
        "data.num_classes=4",
        "data.random_crop=false",
        # As long as a clip, so that each video has one.
        "data.procedural.num_clips=4",
        "data.procedural.num_frames=13",
        "training.global_batch=16",
        "training.micro_batch=16",
        "training.generator_lr=2e-3",
        "training.discriminator_lr=2e-3",
        "stages.1.num_frames=4",
        "stages.1.frame_stride=4",
        "stages.1.generator.channels=8",
        "stages.1.discriminators.channels=8",
        "stages.1.discriminators.multipliers=[2,4]",
        "stages.2.frame_stride=2",
    )
    config = config.model_copy(update={"stages": {1: config.stages[1]}})
    index = open_dataset(config.data, make=True, say=print)
    builder = StageBuilder(config, 1, ranks, describe(index, config.data))
    loader = builder.loader(index)
    real = torch.cat([next(loader).video_BTCHW for _ in range(4)])
    trainer = builder.trainer(loader)
    fakes = builder.fakes(builder.latents(99), None)
    inputs = fakes.draw(64)

    @torch.no_grad()
    def distances() -> torch.Tensor:
        generated = fakes.run(trainer.g_engine.module, inputs).video_BTCHW
        return torch.tensor(learning_distances(real, generated))

    before = distances()
    for _ in range(300):
        trainer.train_step()
    loader.close()
    mean, variance, motion = (distances() / before).tolist()
    assert mean < 0.4
    assert variance < 0.4
    assert motion < 0.83
