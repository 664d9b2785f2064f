"""Convolutions of videos, each with all that stands before and after it in a residual block.

y = [relu of] W * x + b [+ residual] [+ projected x_l],   x a video or relu(norm(video))

| operator           | W                       | where it is used                             |
|--------------------|-------------------------|----------------------------------------------|
| `conv2d`           | [O, kh, kw, I]          | frame by frame, 3x3 or 1x1                   |
| `conv3d`           | [O, kt, kh, kw, I]      | time and space at once, 3x3x3                |
| `separable_conv3d` | [O, 3, I], [O, 3, 3, O] | three taps in time, then 3x3 in space        |
| `upsample_conv`    | [O, 3, 3, I]            | a generator's block: 2x upsampling, then 3x3 |
| `conv_pool2d`      | [O, 3, 3, I]            | a discriminator's block: 3x3, then pooling   |
| `conv_pool3d`      | [O, 3, 3, 3, I]         | a discriminator's block: 3x3x3, then pooling |

Padding is with zeros to the same size, stride is 1. Videos are [B, T, I, H, W] by shape and
channels last in memory, weights channels last too. `conv2d`, `separable_conv3d` and `upsample_conv`
also take `Normalized`: then they compute the norm themselves and return `Measured`, the video with
the moments that the next norm wants, if the implementation computes them without another pass.

`residual_BTOHW` is added: a video of y's size or, in `conv2d`, a shortcut that is upsampled
(`UpsampledShortcut`). `skip` is x_l and its projection (`LowSkip`). `only_graph` is for the last
operator of a block that is computed again for its backward pass, where nobody reads y: y has its
gradient, but its values may be anything, because our own Functions do not compute them.
`implementation` is as in `kernels.dispatch`. All raise ValueError for a residual or an x_l that
does not fit, and ImplementationError for an implementation that cannot run.

FLOPs: 2·k·I·O per pixel of y, k taps; 2·(3·I·O + 9·O²) separably; resampling as in `resampling.py`.
Bytes: x, y and the residual once each, and separably the intermediate twice. `fused.py` has the
implementations, and what is kept for the backward pass.
"""

from typing import overload

from torch import Tensor

from kernels.convolution.folding import Fold, Folded
from kernels.convolution.fused import convolve
from kernels.convolution.normalized import Measured, Moments, Normalized, size_of
from kernels.convolution.pytorch import Layout
from kernels.convolution.resampling import Pooling, average_pool, pooled, upsampled
from kernels.convolution.terms import LowSkip, UpsampledShortcut, add_low_skip

__all__ = [
    "Fold",
    "Folded",
    "LowSkip",
    "Measured",
    "Moments",
    "Normalized",
    "Pooling",
    "UpsampledShortcut",
    "add_low_skip",
    "average_pool",
    "conv2d",
    "conv3d",
    "conv_pool2d",
    "conv_pool3d",
    "separable_conv3d",
    "upsample_conv",
]


@overload
def conv2d(
    x_BTIHW: Tensor,
    weight_OhwI: Tensor,
    bias_O: Tensor | None = None,
    *,
    residual_BTOHW: Tensor | UpsampledShortcut | None = None,
    skip: LowSkip | None = None,
    relu: bool = False,
    only_graph: bool = False,
    implementation: str | None = None,
) -> Tensor: ...


@overload
def conv2d(
    x_BTIHW: Normalized,
    weight_OhwI: Tensor,
    bias_O: Tensor | None = None,
    *,
    residual_BTOHW: Tensor | UpsampledShortcut | None = None,
    skip: LowSkip | None = None,
    relu: bool = False,
    only_graph: bool = False,
    implementation: str | None = None,
) -> Measured: ...


def conv2d(
    x_BTIHW: Tensor | Normalized,
    weight_OhwI: Tensor,
    bias_O: Tensor | None = None,
    *,
    residual_BTOHW: Tensor | UpsampledShortcut | None = None,
    skip: LowSkip | None = None,
    relu: bool = False,
    only_graph: bool = False,
    implementation: str | None = None,
) -> Tensor | Measured:
    """Convolve every frame by itself; returns [B, T, O, H, W], with `relu` the ReLU of the sum.

    >>> x_BTIHW, weight_OhwI = torch.randn(2, 3, 8, 6, 6), torch.randn(16, 3, 3, 8)
    >>> kernels.conv2d(x_BTIHW, weight_OhwI, torch.zeros(16), relu=True).shape
    torch.Size([2, 3, 16, 6, 6])
    >>> gain_BI, bias_BI = torch.ones(2, 8), torch.zeros(2, 8)
    >>> y = kernels.conv2d(kernels.Normalized(x_BTIHW, gain_BI, bias_BI), weight_OhwI)
    >>> y.video.shape
    torch.Size([2, 3, 16, 6, 6])
    """
    y_BTOHW, moments = convolve(
        x_BTIHW,
        weight_OhwI,
        bias_O,
        Layout(size_of(x_BTIHW)),
        residual=residual_BTOHW,
        skip=skip,
        relu=relu,
        only_graph=only_graph,
        implementation=implementation,
    )
    return Measured(y_BTOHW, moments) if isinstance(x_BTIHW, Normalized) else y_BTOHW


def conv3d(
    x_BTIHW: Tensor,
    weight_OthwI: Tensor,
    bias_O: Tensor | None = None,
    *,
    residual_BTOHW: Tensor | None = None,
    relu: bool = False,
    only_graph: bool = False,
    implementation: str | None = None,
) -> Tensor:
    """Convolve in time and space at once; returns [B, T, O, H, W].

    >>> kernels.conv3d(torch.randn(2, 3, 8, 6, 6), torch.randn(16, 3, 3, 3, 8)).shape
    torch.Size([2, 3, 16, 6, 6])
    """
    y_BTOHW, _ = convolve(
        x_BTIHW,
        weight_OthwI,
        bias_O,
        Layout(size_of(x_BTIHW), volume=True),
        residual=residual_BTOHW,
        relu=relu,
        only_graph=only_graph,
        implementation=implementation,
    )
    return y_BTOHW


@overload
def separable_conv3d(
    x_BTIHW: Tensor,
    temporal_weight_OtI: Tensor,
    spatial_weight_OhwO: Tensor,
    bias_O: Tensor | None = None,
    *,
    residual_BTOHW: Tensor | None = None,
    skip: LowSkip | None = None,
    only_graph: bool = False,
    implementation: str | None = None,
) -> Tensor: ...


@overload
def separable_conv3d(
    x_BTIHW: Normalized,
    temporal_weight_OtI: Tensor,
    spatial_weight_OhwO: Tensor,
    bias_O: Tensor | None = None,
    *,
    residual_BTOHW: Tensor | None = None,
    skip: LowSkip | None = None,
    only_graph: bool = False,
    implementation: str | None = None,
) -> Measured: ...


def separable_conv3d(
    x_BTIHW: Tensor | Normalized,
    temporal_weight_OtI: Tensor,
    spatial_weight_OhwO: Tensor,
    bias_O: Tensor | None = None,
    *,
    residual_BTOHW: Tensor | None = None,
    skip: LowSkip | None = None,
    only_graph: bool = False,
    implementation: str | None = None,
) -> Tensor | Measured:
    """Three taps in time, then 3x3 in space; returns [B, T, O, H, W].

    SSW-GAN, upsampling stages: it stands for one convolution of the residual block that replaces
    the ConvGRU there. Between the two halves there is no bias and no nonlinearity; residual and
    `skip` are added after the spatial half. Kept for backward: x, or what it is the norm of, and
    the intermediate.

    >>> temporal_OtI, spatial_OhwO = torch.randn(16, 3, 8), torch.randn(16, 3, 3, 16)
    >>> kernels.separable_conv3d(torch.randn(2, 3, 8, 6, 6), temporal_OtI, spatial_OhwO).shape
    torch.Size([2, 3, 16, 6, 6])
    """
    # With H and W as one axis the temporal half is a (3, 1) conv2d on a channels-last view, with no
    # copy: conv2d has the better kernels, and bf16 conv3d is wrong in some cuDNN versions.
    size = size_of(x_BTIHW)
    time = Layout(size, columns=True)
    mixed_BTOHW, _ = convolve(
        x_BTIHW,
        temporal_weight_OtI.unsqueeze(2),
        None,
        time,
        moments=False,
        implementation=implementation,
    )
    y_BTOHW, moments = convolve(
        mixed_BTOHW,
        spatial_weight_OhwO,
        bias_O,
        Layout(size),
        residual=residual_BTOHW,
        skip=skip,
        moments=isinstance(x_BTIHW, Normalized) and x_BTIHW.wants_moments,
        only_graph=only_graph,
        implementation=implementation,
    )
    return Measured(y_BTOHW, moments) if isinstance(x_BTIHW, Normalized) else y_BTOHW


@overload
def upsample_conv(
    x_BTIHW: Tensor,
    weight_OhwI: Tensor | Folded,
    bias_O: Tensor | None = None,
    *,
    implementation: str | None = None,
) -> Tensor: ...


@overload
def upsample_conv(
    x_BTIHW: Normalized,
    weight_OhwI: Tensor | Folded,
    bias_O: Tensor | None = None,
    *,
    implementation: str | None = None,
) -> Measured: ...


def upsample_conv(
    x_BTIHW: Tensor | Normalized,
    weight_OhwI: Tensor | Folded,
    bias_O: Tensor | None = None,
    *,
    implementation: str | None = None,
) -> Tensor | Measured:
    """Upsample every frame by two and convolve it; returns [B, T, O, 2H, 2W] in the dtype of x.

    `implementation` is "folded" or "reference".

    >>> kernels.upsample_conv(torch.randn(2, 3, 8, 6, 6), torch.randn(16, 3, 3, 8)).shape
    torch.Size([2, 3, 16, 12, 12])
    """
    y_BTOHW, moments = upsampled(x_BTIHW, weight_OhwI, bias_O, implementation)
    return Measured(y_BTOHW, moments) if isinstance(x_BTIHW, Normalized) else y_BTOHW


def conv_pool2d(
    x_BTIHW: Tensor,
    weight_OhwI: Tensor | Folded,
    bias_O: Tensor | None = None,
    *,
    residual_BTOHW: Tensor | None = None,
    only_graph: bool = False,
    implementation: str | None = None,
) -> Tensor:
    """Convolve every frame, pool 2x2, add the (already pooled) residual.

    Returns [B, T, O, H // 2, W // 2] in the dtype of x. `implementation` is "folded" or
    "reference".

    >>> kernels.conv_pool2d(torch.randn(2, 3, 8, 6, 6), torch.randn(16, 3, 3, 8)).shape
    torch.Size([2, 3, 16, 3, 3])
    """
    return pooled(
        x_BTIHW,
        weight_OhwI,
        bias_O,
        (1, 2, 2),
        volume=False,
        residual=residual_BTOHW,
        only_graph=only_graph,
        implementation=implementation,
    )


def conv_pool3d(
    x_BTIHW: Tensor,
    weight_OthwI: Tensor | Folded,
    bias_O: Tensor | None = None,
    *,
    residual_BTOHW: Tensor | None = None,
    pooling: Pooling = (1, 2, 2),
    only_graph: bool = False,
    implementation: str | None = None,
) -> Tensor:
    """Convolve in time and space, pool, add the (already pooled) residual.

    Returns [B, T // pooling[0], O, H // 2, W // 2] in the dtype of x. `pooling` is (1, 2, 2), which
    keeps time, or (2, 2, 2). `implementation` is "folded" or "reference".

    >>> kernels.conv_pool3d(torch.randn(2, 4, 8, 6, 6), torch.randn(16, 3, 3, 3, 8)).shape
    torch.Size([2, 4, 16, 3, 3])
    """
    return pooled(
        x_BTIHW,
        weight_OthwI,
        bias_O,
        pooling,
        volume=True,
        residual=residual_BTOHW,
        only_graph=only_graph,
        implementation=implementation,
    )
