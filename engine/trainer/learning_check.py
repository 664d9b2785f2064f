"""Has a generator learned? How far its videos' simplest statistics are from the data's.

Not a metric of quality: three numbers that an untrained generator gets wrong and that cost
nothing, for a test and for the demo's last lines. Shapes: B batch, T frames, C, H x W pixels.
"""

from typing import NamedTuple

from torch import Tensor


class Distances(NamedTuple):
    """Root mean squares over pixels, channels and time steps, in units of [-1, 1] pixel values."""

    mean: float
    """Of the difference of the videos' per-pixel means over the batch."""
    variance: float
    """Of the difference of their per-pixel variances over the batch."""
    motion: float
    """Of the difference of the per-pixel means of |x_{t+1} - x_t|."""


def learning_distances(real_BTCHW: Tensor, fake_BTCHW: Tensor) -> Distances:
    """Distances between two batches of videos, which may differ in B; zero for equal ones.

    Raises ValueError when their videos differ in shape, or have a single frame.
    """
    if real_BTCHW.shape[1:] != fake_BTCHW.shape[1:]:
        raise ValueError(
            f"videos of {tuple(real_BTCHW.shape[1:])} and of {tuple(fake_BTCHW.shape[1:])}"
        )
    if real_BTCHW.shape[1] < 2:
        raise ValueError("videos of one frame do not move")
    statistics = zip(_statistics(real_BTCHW), _statistics(fake_BTCHW), strict=True)
    return Distances(*((real - fake).square().mean().sqrt().item() for real, fake in statistics))


def _statistics(video_BTCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    video_BTCHW = video_BTCHW.float()
    return (
        video_BTCHW.mean(dim=0),
        video_BTCHW.var(dim=0, correction=0),  # also of a single video
        video_BTCHW.diff(dim=1).abs().mean(dim=0),
    )
