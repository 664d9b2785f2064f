"""Convolutions without resampling, 3x3 (or 1x1) per frame and 3x3x3.

y = W * x + b [+ residual] [+ projected x_l], "same" zero padding, stride 1. The residual is of y's
size, or a shortcut that upsamples.

Shapes: B batch, T frames, I input and O output channels, H x W pixels. Weights are stored
channels last, [O, kh, kw, I] and [O, kt, kh, kw, I]. FLOPs: 2·k·I·O per output pixel, k taps.
Bytes: x, y and the residual once each.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.convolution import Moments, Normalized, convolve, size_of
from kernels.convolution_pytorch import Layout
from kernels.layout import (
    channels_last,
    conv3d_weight,
)
from kernels.low_skip import LowSkip
from kernels.upsampled_shortcut import UpsampledShortcut


def conv2d(
    x_BTIHW: Tensor | Normalized,
    weight_OhwI: Tensor,
    bias_O: Tensor | None = None,
    *,
    residual_BTOHW: Tensor | UpsampledShortcut | None = None,
    skip: LowSkip | None = None,
    impl: str | None = None,
) -> Tensor:
    """Convolve every frame by itself; returns [B, T, O, H, W].

    `impl` as in `kernels.implementation`. Raises ValueError for a residual or an x_l that does not
    fit.
    """
    layout = Layout(size_of(x_BTIHW))
    y_BTOHW, _ = convolve(
        x_BTIHW, weight_OhwI, bias_O, layout, residual_BTOHW=residual_BTOHW, skip=skip, impl=impl
    )
    return y_BTOHW


def conv2d_with_moments(
    x_BTIHW: Tensor | Normalized,
    weight_OhwI: Tensor,
    bias_O: Tensor | None = None,
    *,
    residual_BTOHW: Tensor | UpsampledShortcut | None = None,
    skip: LowSkip | None = None,
    only_graph: bool = False,
    impl: str | None = None,
) -> tuple[Tensor, Moments | None]:
    """As `conv2d`, and the moments of the result where they cost little (else None).

    `only_graph`: as `kernels.convolution.convolve`'s.
    """
    return convolve(
        x_BTIHW,
        weight_OhwI,
        bias_O,
        Layout(size_of(x_BTIHW)),
        residual_BTOHW=residual_BTOHW,
        skip=skip,
        moments=True,
        only_graph=only_graph,
        impl=impl,
    )


def conv3d(
    x_BTIHW: Tensor,
    weight_OthwI: Tensor,
    bias_O: Tensor | None = None,
    *,
    residual_BTOHW: Tensor | None = None,
) -> Tensor:
    """Convolve in time and space at once; returns [B, T, O, H, W]."""
    padding = [size // 2 for size in weight_OthwI.shape[1:4]]
    x_BITHW = channels_last(x_BTIHW).transpose(1, 2)
    y_BOTHW = convolve_volume(x_BITHW, conv3d_weight(weight_OthwI), bias_O, padding=padding)
    return add(y_BOTHW.transpose(1, 2), residual_BTOHW)


def convolve_volume(
    x_BITHW: Tensor,
    weight_OIthw: Tensor,
    bias_O: Tensor | None,
    *,
    stride: Sequence[int] = (1, 1, 1),
    padding: Sequence[int],
) -> Tensor:
    """`F.conv3d`, but on a CPU in fp32 whatever the dtype.

    oneDNN's bf16 weight gradient is uninitialised memory for some shapes, such as the matching
    discriminator's 6 channels and 2 frames (torch 2.13; see tests/kernels/test_convolutions.py).
    """
    narrow = x_BITHW.device.type == "cpu" and x_BITHW.dtype in (torch.bfloat16, torch.float16)
    if not narrow:
        return F.conv3d(x_BITHW, weight_OIthw, bias_O, stride=stride, padding=padding)
    bias_O = None if bias_O is None else bias_O.float()
    y_BOTHW = F.conv3d(
        x_BITHW.float(), weight_OIthw.float(), bias_O, stride=stride, padding=padding
    )
    return y_BOTHW.to(x_BITHW.dtype)


def add(y_BTOHW: Tensor, residual_BTOHW: Tensor | None) -> Tensor:
    """What a convolution may end with: a block's shortcut."""
    return y_BTOHW if residual_BTOHW is None else y_BTOHW + residual_BTOHW
