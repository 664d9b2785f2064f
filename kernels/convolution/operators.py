"""The registered operators of `kernels.convolution`, and their fakes: Triton's launches.

Shapes as in `fused.py`: x is rows [B, T, S, I]. Triton is imported on first use.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.convolution.normalized import Moments
from kernels.registration import operator


@operator("convolution")
def fused_convolution(
    x_BTSI: Tensor,
    weight_OabI: Tensor,
    bias_O: Tensor | None,
    residual_BTSO: Tensor | None,
    video_BtIhw: Tensor | None,
    low_weight: Tensor | None,
    low_bias: Tensor | None,
    size: Sequence[int],
    columns: bool,
    relu: bool,
    moments: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y with all its terms, mean and variance; the last two are empty if not asked for."""
    from kernels.convolution import triton as convolution_triton

    weight = weight_OabI if weight_OabI.ndim == 5 else weight_OabI.unsqueeze(3 if columns else 1)
    y_BTHWO, own = convolution_triton.convolve(
        x_BTSI.unflatten(2, size),
        weight.contiguous(),
        bias_O,
        _frames(residual_BTSO, size),
        _low(video_BtIhw, low_weight, low_bias, x_BTSI.dtype),
        moments,
        relu,
    )
    return y_BTHWO.flatten(2, 3), *(own or _no_moments(x_BTSI))


@torch.library.register_fake(fused_convolution)
def _(x_BTSI: Tensor, weight_OabI: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    num_channels = weight_OabI.shape[0]
    y_BTSO = x_BTSI.new_empty(*x_BTSI.shape[:3], num_channels)
    return y_BTSO, *_fake_moments(y_BTSO, rest[-1])


@operator("add_terms_", mutates_args=("y_BTSO",))
def add_terms_(
    y_BTSO: Tensor,
    bias_O: Tensor | None,
    residual_BTSO: Tensor | None,
    video_BtIhw: Tensor | None,
    low_weight: Tensor | None,
    low_bias: Tensor | None,
    size: Sequence[int],
    relu: bool,
    moments: bool,
) -> tuple[Tensor, Tensor]:
    """Adds all terms to y; its mean and variance, empty if not asked for.

    A residual of a quarter of y's pixels is upsampled.
    """
    from kernels.convolution import epilogue

    _, own = epilogue.add_terms(
        y_BTSO.unflatten(2, size),
        bias_O,
        _frames(residual_BTSO, size),
        _low(video_BtIhw, low_weight, low_bias, y_BTSO.dtype),
        moments,
        relu,
        in_place=True,
    )
    return own or _no_moments(y_BTSO)


@torch.library.register_fake(add_terms_)
def _(y_BTSO: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _fake_moments(y_BTSO, rest[-1])


def _frames(residual_BTSO: Tensor | None, size: Sequence[int]) -> Tensor | None:
    """[B, T, H, W, O], of y's `size` or half of it."""
    if residual_BTSO is None:
        return None
    height, width = size
    if residual_BTSO.shape[2] == height * width:
        return residual_BTSO.unflatten(2, size)
    return residual_BTSO.unflatten(2, (height // 2, width // 2))


def _low(
    video: Tensor | None, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor] | None:
    """x_l channels last, and its projection as a matrix."""
    if video is None or weight is None or bias is None:
        return None
    return video.permute(0, 1, 3, 4, 2).to(dtype).contiguous(), weight.flatten(1), bias


def _no_moments(like: Tensor) -> Moments:
    return like.new_empty(0, dtype=torch.float32), like.new_empty(0, dtype=torch.float32)


def _fake_moments(y_BTSO: Tensor, moments: bool) -> Moments:
    if not moments:
        return _no_moments(y_BTSO)
    mean_TO = y_BTSO.new_empty(y_BTSO.shape[1], y_BTSO.shape[3], dtype=torch.float32)
    return mean_TO, torch.empty_like(mean_TO)
