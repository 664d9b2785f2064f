"""What one training step executes, counted on the meta device."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from engine.configuration import Config
from engine.models import build_discriminators, build_generator, draw_frame_indices


class Forward(NamedTuple):
    """GFLOP of one forward pass of one sample; two per multiply-add."""

    generator: float
    spatial: float
    temporal: float
    matching: float

    @property
    def step(self) -> float:
        """TFLOP per sample of two D updates and one G update.

        A backward pass costs twice its forward. D update: G forward, D forward and backward on
        real and fake. G update: G forward and backward, D forward and, for its input only, back.
        """
        discriminators = self.spatial + self.temporal + self.matching
        d_update = self.generator + 2 * 3 * discriminators
        g_update = 3 * self.generator + 2 * discriminators
        return (2 * d_update + g_update) / 1e3


def count_forward(config: Config, stage_number: int) -> Forward:
    """Count a stage's networks at their full size."""
    stage = config.stages[stage_number]
    with torch.device("meta"):
        generator = build_generator(config, stage_number)
        discriminators = build_discriminators(config, stage_number)
        z = torch.empty(1, generator.latent_size)
        labels = torch.empty(1, dtype=torch.long) if config.data.num_classes else None
        video = torch.empty(1, stage.num_frames, 3, stage.resolution, stage.resolution)
        frames = draw_frame_indices(1, stage.num_frames, stage.discriminators.spatial_frames)
        low = None
        if stage_number > 1:
            window = config.upsampling(stage_number)
            low = torch.empty(1, window.num_frames, 3, window.resolution, window.resolution)
        matching = discriminators.matching
        return Forward(
            _gigaflops(generator, z, labels, stage.num_frames if low is None else low),
            _gigaflops(discriminators.spatial, video, labels, frames.to("meta")),
            _gigaflops(discriminators.temporal, video, labels),
            0.0 if matching is None else _gigaflops(matching, video, labels, low),
        )


def _gigaflops(network: nn.Module, *args: Any) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        result: Tensor = network(*args)
    assert result.is_meta
    assert math.prod(result.shape) > 0
    return counter.get_total_flops() / 1e9
