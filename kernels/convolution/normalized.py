"""A norm that the convolution after it computes, and what the convolution tells the next norm.

A generator's block is norm, ReLU, convolution, norm, ReLU, convolution. A convolution that is
given `Normalized` computes relu(norm(x)) itself, so it need not keep the result for the backward
pass. It returns `Measured`: its own result with the moments that the next norm would have to take.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch import distributed as dist

from kernels import frame_norm as norms
from kernels.frame_norm.operands import NormMethod, NormOperands

Moments = tuple[Tensor, Tensor]
"""Mean and biased variance per (time step, channel), [T, C] each, without a gradient."""


@dataclass(frozen=True)
class Normalized:
    """relu(norm(video)), not computed yet. Fields as the arguments of `kernels.frame_norm`."""

    video: Tensor
    gain: Tensor
    bias: Tensor
    statistics: tuple[Tensor, Tensor] | None = None
    group: dist.ProcessGroup | None = None
    moments: Moments | None = None
    """Of the video, where whoever made it knows them."""
    kept: bool = False
    """Whether the result is computed once and kept for the backward pass after all: more memory,
    the same bits."""
    wants_moments: bool = False
    """Whether a norm comes next. If so the convolution also returns the moments of its result,
    which saves that norm a pass."""

    def value(self, implementation: str | None = None) -> Tensor:
        """The normalised video itself."""
        return norms.apply(*self.prepare(implementation), self.video.shape[3:])

    def prepare(self, implementation: str | None) -> tuple[NormOperands, NormMethod]:
        """What the norm's passes take."""
        return norms.prepare(
            self.video,
            self.gain,
            self.bias,
            self.statistics,
            self.group,
            implementation,
            self.moments,
        )


class Measured(NamedTuple):
    """What a convolution makes of `Normalized`."""

    video: Tensor
    moments: Moments | None
    """Of the video; None if nobody wants them, or if they would cost a pass of their own."""


def source_of(x: Tensor | Normalized) -> Tensor:
    """The tensor that exists: x itself, or what is to be normalised."""
    return x.video if isinstance(x, Normalized) else x


def size_of(x: Tensor | Normalized) -> tuple[int, int]:
    """H, W."""
    height, width = source_of(x).shape[-2:]
    return height, width
