"""Convolutions without resampling, 3x3 (or 1x1) per frame and 3x3x3.

y = [relu of] W * x + b [+ residual] [+ projected x_l], "same" zero padding, stride 1. The residual
is of y's size, or a shortcut that upsamples.

Shapes: B batch, T frames, I input and O output channels, H x W pixels. Weights are stored
channels last, [O, kh, kw, I] and [O, kt, kh, kw, I]. FLOPs: 2·k·I·O per output pixel, k taps.
Bytes: x, y and the residual once each.
"""

from torch import Tensor

from kernels.convolution.fused import Moments, Normalized, convolve, size_of
from kernels.convolution.low_skip import LowSkip
from kernels.convolution.pytorch import Layout
from kernels.convolution.upsampled_shortcut import UpsampledShortcut


def conv2d(
    x_BTIHW: Tensor | Normalized,
    weight_OhwI: Tensor,
    bias_O: Tensor | None = None,
    *,
    residual_BTOHW: Tensor | UpsampledShortcut | None = None,
    skip: LowSkip | None = None,
    relu: bool = False,
    only_graph: bool = False,
    impl: str | None = None,
) -> Tensor:
    """Convolve every frame by itself; returns [B, T, O, H, W], with `relu` the ReLU of the sum.

    `only_graph` as `kernels.convolution.fused.convolve`'s, `impl` as in `kernels.dispatch`. Raises
    ValueError for a residual or an x_l that does not fit.
    """
    y_BTOHW, _ = convolve(
        x_BTIHW,
        weight_OhwI,
        bias_O,
        Layout(size_of(x_BTIHW)),
        residual_BTOHW=residual_BTOHW,
        skip=skip,
        relu=relu,
        only_graph=only_graph,
        impl=impl,
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
    wanted: bool = True,
    impl: str | None = None,
) -> tuple[Tensor, Moments | None]:
    """As `conv2d`, and the moments of the result if `wanted` and where they cost little, else None.

    `only_graph`: as `kernels.convolution.fused.convolve`'s.
    """
    return convolve(
        x_BTIHW,
        weight_OhwI,
        bias_O,
        Layout(size_of(x_BTIHW)),
        residual_BTOHW=residual_BTOHW,
        skip=skip,
        moments=wanted,
        only_graph=only_graph,
        impl=impl,
    )


def conv3d(
    x_BTIHW: Tensor | Normalized,
    weight_OthwI: Tensor,
    bias_O: Tensor | None = None,
    *,
    residual_BTOHW: Tensor | None = None,
    relu: bool = False,
    only_graph: bool = False,
    impl: str | None = None,
) -> Tensor:
    """Convolve in time and space at once; returns [B, T, O, H, W]. The rest as in `conv2d`."""
    y_BTOHW, _ = convolve(
        x_BTIHW,
        weight_OthwI,
        bias_O,
        Layout(size_of(x_BTIHW), volume=True),
        residual_BTOHW=residual_BTOHW,
        relu=relu,
        only_graph=only_graph,
        impl=impl,
    )
    return y_BTOHW
