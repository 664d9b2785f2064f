"""Small networks that tests share: 16x16 pixels, x_l 8x8 at half the frame rate, z of 16."""

from typing import Any

import torch
from torch import Tensor, nn

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


def run(network: nn.Module, seed: int = 1) -> Tensor:
    """A generator's video, or all scores of discriminators, of drawn inputs with classes."""
    random = torch.Generator().manual_seed(seed)
    labels, low = torch.tensor([1, 3]), torch.randn(2, 2, 3, 8, 8, generator=random)
    if isinstance(network, Discriminators):
        video = torch.randn(2, 4, 3, 16, 16, generator=random)
        scores: Tensor = network(video, labels, low, torch.tensor([[0, 2], [1, 3]])).all
        return scores
    z = torch.randn(2, 16, generator=random)
    y: Tensor = network(z, labels, low if hasattr(network, "frame_step") else 4)
    return y


def results(network: nn.Module, seed: int = 1) -> list[Tensor]:
    """The output and every parameter's gradient."""
    y = run(network, seed)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, list(network.parameters()), upstream)]
