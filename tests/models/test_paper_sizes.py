"""The paper's networks at full size on the meta device: parameters, FLOPs and shapes.

FLOPs are of one forward pass of one sample, convolutions and matrix products only, two per
multiply-add. G of stage 1 and of DVD-GAN is counted with the ConvGRU as its equations stand, and
resampling as it stands too; `test_step_flops.py` counts what is executed.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import kernels
from engine.models.discriminators import (
    MatchingDiscriminator,
    SpatialDiscriminator,
    TemporalDiscriminator,
    draw_frame_indices,
)
from engine.models.generator import ClipGenerator
from engine.models.upsampler import UpsamplingGenerator

NUM_CLASSES = 600


@pytest.fixture(autouse=True)
def _meta() -> Iterator[None]:
    with torch.device("meta"), kernels.use("reference"):
        yield


def labels() -> Tensor:
    return torch.empty(1, dtype=torch.long)


def clip_generator(resolution: int, multipliers: Sequence[int]) -> ClipGenerator:
    return ClipGenerator(
        resolution=resolution,
        channels=128,
        multipliers=multipliers,
        temporal="conv_gru",
        num_classes=NUM_CLASSES,
    )


def millions(network: nn.Module) -> float:
    return sum(p.numel() for p in network.parameters()) / 1e6


def gigaflops(run: Callable[..., Tensor], *args: Any) -> tuple[float, tuple[int, ...]]:
    with FlopCounterMode(display=False) as counter:
        result = run(*args)
    return counter.get_total_flops() / 1e9, tuple(result.shape)


@pytest.mark.parametrize(
    ("resolution", "multipliers", "num_frames", "expected_millions", "plain", "executed"),
    [(32, (8, 8, 4, 2), 25, 306, 3040, 2985), (128, (8, 8, 4, 2, 1), 50, 312, 9381, 9288)],
    ids=["stage 1", "DVD-GAN"],
)
def test_clip_generator(
    monkeypatch: pytest.MonkeyPatch,
    resolution: int,
    multipliers: tuple[int, ...],
    num_frames: int,
    expected_millions: int,
    plain: int,
    executed: int,
) -> None:
    generator = clip_generator(resolution, multipliers)
    assert round(millions(generator)) == expected_millions
    z = torch.empty(1, 128)
    flops, shape = gigaflops(generator, z, labels(), num_frames)
    assert shape == (1, num_frames, 3, resolution, resolution)
    assert round(flops) == plain
    # Unit 1's constant input is convolved once, and nothing is convolved with h = 0.
    monkeypatch.setattr(kernels, "conv_gru", partial(kernels.conv_gru, implementation="auto"))
    assert round(gigaflops(generator, z, labels(), num_frames)[0]) == executed


@pytest.mark.parametrize(("low_frames", "expected"), [(6, 1611), (3, 806)])
def test_upsampling_generator(low_frames: int, expected: int) -> None:
    generator = UpsamplingGenerator(
        resolution=128,
        channels=128,
        multipliers=(8, 8, 4, 2, 1),
        temporal="separable_conv",
        low_resolution=32,
        frame_step=2,
        num_classes=NUM_CLASSES,
    )
    assert round(millions(generator)) == 211
    low = torch.empty(1, low_frames, 3, 32, 32)
    flops, shape = gigaflops(generator, torch.empty(1, 128), labels(), low)
    assert shape == (1, 2 * low_frames, 3, 128, 128)
    assert round(flops) == expected


STAGE1: dict[str, Any] = {
    "channels": 128,
    "multipliers": (2, 4, 8, 16, 16),
    "num_classes": NUM_CLASSES,
}
STAGE2: dict[str, Any] = {
    "channels": 96,
    "multipliers": (1, 2, 4, 8, 16, 16),
    "num_classes": NUM_CLASSES,
}


@pytest.mark.parametrize(
    ("sizes", "resolution", "num_frames", "expected_millions", "expected"),
    [(STAGE1, 32, 25, 158.6, 74.5), (STAGE2, 128, 12, 89.7, 165.6), (STAGE2, 128, 50, 89.7, 165.6)],
    ids=["stage 1", "stage 2", "DVD-GAN"],
)
def test_spatial_discriminator(
    sizes: dict[str, Any],
    resolution: int,
    num_frames: int,
    expected_millions: float,
    expected: float,
) -> None:
    network = SpatialDiscriminator(resolution=resolution, **sizes)
    video = torch.empty(1, num_frames, 3, resolution, resolution)
    indices = draw_frame_indices(1, num_frames, 8).to("meta")
    flops, shape = gigaflops(network, video, labels(), indices)
    assert shape == (1, 8)
    assert round(flops, 1) == expected
    assert round(millions(network), 1) == expected_millions


# Time is not pooled, so that every time step is scored and short windows survive; with a pooling
# of (2, 2, 2) in the 3D blocks these would be 68.6, 57.2 and (matching) 8.6.
@pytest.mark.parametrize(
    ("sizes", "resolution", "num_frames", "expected_millions", "expected"),
    [
        (STAGE1, 32, 25, 166.9, 179.5),
        (STAGE2, 128, 12, 90.9, 116.6),
        (STAGE2, 128, 6, 90.9, 58.3),
        (STAGE2, 128, 50, 90.9, 485.9),
    ],
    ids=["stage 1", "stage 2", "stage 2, window 3", "DVD-GAN"],
)
def test_temporal_discriminator(
    sizes: dict[str, Any],
    resolution: int,
    num_frames: int,
    expected_millions: float,
    expected: float,
) -> None:
    network = TemporalDiscriminator(resolution=resolution, **sizes)
    video = torch.empty(1, num_frames, 3, resolution, resolution)
    flops, shape = gigaflops(network, video, labels())
    assert shape == (1, num_frames)
    assert round(flops, 1) == expected
    assert round(millions(network), 1) == expected_millions


@pytest.mark.parametrize(("low_frames", "expected"), [(6, 25.9), (3, 13.0)])
def test_matching_discriminator(low_frames: int, expected: float) -> None:
    network = MatchingDiscriminator(low_resolution=32, frame_step=2, **STAGE2)
    video = torch.empty(1, 2 * low_frames, 3, 128, 128)
    low = torch.empty(1, low_frames, 3, 32, 32)
    flops, shape = gigaflops(network, video, labels(), low)
    assert shape == (1, low_frames)
    assert round(flops, 1) == expected
    assert round(millions(network), 1) == 90.9
