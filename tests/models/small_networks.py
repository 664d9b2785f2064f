"""Small networks that tests share: 16x16 pixels, x_l 8x8 at half the frame rate, z of 16."""

from typing import Any

import torch

from engine.models.blocks import Temporal
from engine.models.discriminators import (
    Discriminators,
    MatchingDiscriminator,
    SpatialDiscriminator,
    TemporalDiscriminator,
)
from engine.models.generator import ClipGenerator
from engine.models.upsampler import UpsamplingGenerator


def clip_generator(
    *,
    num_classes: int | None = None,
    temporal: Temporal = "conv_gru",
    compute_dtype: torch.dtype = torch.float32,
) -> ClipGenerator:
    """Three units, the last of which does not upsample."""
    return ClipGenerator(
        resolution=16,
        channels=4,
        multipliers=(4, 2, 1),
        temporal=temporal,
        num_classes=num_classes,
        latent_size=16,
        class_embedding_size=6,
        compute_dtype=compute_dtype,
    )


def upsampling_generator(
    *,
    num_classes: int | None = None,
    temporal: Temporal = "separable_conv",
    compute_dtype: torch.dtype = torch.float32,
) -> UpsamplingGenerator:
    """Three units, the last of which does not upsample and works above x_l's size."""
    return UpsamplingGenerator(
        resolution=16,
        channels=4,
        multipliers=(4, 2, 1),
        temporal=temporal,
        low_resolution=8,
        frame_step=2,
        num_classes=num_classes,
        latent_size=16,
        class_embedding_size=6,
        compute_dtype=compute_dtype,
    )


def discriminators(
    *,
    num_classes: int | None = None,
    matching: bool = True,
    minibatch_stddev: bool = False,
    compute_dtype: torch.dtype = torch.float32,
) -> Discriminators:
    """All three, for the upsampling generator above."""
    sizes: dict[str, Any] = {
        "channels": 4,
        "multipliers": (1, 2, 4),
        "num_classes": num_classes,
        "minibatch_stddev": minibatch_stddev,
        "compute_dtype": compute_dtype,
    }
    return Discriminators(
        SpatialDiscriminator(resolution=16, **sizes),
        TemporalDiscriminator(resolution=16, **sizes),
        MatchingDiscriminator(low_resolution=8, frame_step=2, **sizes) if matching else None,
    )
