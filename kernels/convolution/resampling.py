"""Convolutions that resample: 2x upsampling before one, average pooling after one.

    y = W * up(x) + b                     how a generator's upsampling block begins
    y = pool(W * x + b) [+ residual]      how a discriminator's block ends

Upsampling is to nearest neighbours, of rows and columns (SSW-GAN, after BigGAN). Pooling is 2x2 in
2D; in 3D it is (1, 2, 2), which keeps time, or (2, 2, 2). A last frame, row or column without a
partner is dropped.

Shapes: B batch, T frames, I input and O output channels, H x W pixels of x. Weights [O, 3, 3, I]
and [O, 3, 3, 3, I] are kept in fp32: they are folded as they come, then cast to the dtype of x. A
weight that was folded before comes as `Folded`.

Each is computed as one convolution with the resampling folded into its kernel (`folding.py`). up(x)
repeats every pixel four times, so the taps that meet the same pixel are summed first. Pooling is a
convolution with stride, so both kernels together are one that is a tap longer along every pooled
axis. FLOPs per pixel of x, in units of I·O, and what is written besides y:

|           | upsampling | pooling 2D | (1, 2, 2) | (2, 2, 2) | besides y                        |
|-----------|------------|------------|-----------|-----------|----------------------------------|
| reference | 72         | 18         | 54        | 54        | up(x), or W * x + b and its read |
| folded    | 32         | 8          | 24        | 16        | nothing                          |

The reference and the folded convolution are the same function, with derivatives of any order.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.common.layout import conv2d_weight, fold_frames, unfold_frames
from kernels.convolution.folding import Folded, folded
from kernels.convolution.fused import convolve
from kernels.convolution.normalized import Moments, Normalized, size_of, source_of
from kernels.convolution.pytorch import Layout
from kernels.dispatch import REFERENCE, Implementation, Operator, everywhere

Pooling = tuple[int, int, int]
"""Frames, rows and columns whose mean is taken."""

UPSAMPLE = Operator("upsample_conv", Implementation("folded", everywhere))
POOL2D = Operator("conv_pool2d", Implementation("folded", everywhere))
POOL3D = Operator("conv_pool3d", Implementation("folded", everywhere))


def upsampled(
    x_BTIHW: Tensor | Normalized,
    weight_OhwI: Tensor | Folded,
    bias_O: Tensor | None,
    implementation: str | None,
) -> tuple[Tensor, Moments | None]:
    """`upsample_conv`, and the moments of the result where `Normalized` wants them."""
    kernel_OabI = weight_OhwI.kernel if isinstance(weight_OhwI, Folded) else weight_OhwI
    taps = (4, 4) if isinstance(weight_OhwI, Folded) else (3, 3)
    if kernel_OabI.ndim != 4 or kernel_OabI.shape[1:3] != taps:
        raise ValueError(
            f"the weight must be [O, 3, 3, I], folded [O, 4, 4, I], not {[*kernel_OabI.shape]}"
        )
    video = source_of(x_BTIHW)
    implementation = UPSAMPLE.choose(implementation, video.device, video.dtype)
    if implementation == REFERENCE and not isinstance(weight_OhwI, Folded):
        x = x_BTIHW.value(REFERENCE) if isinstance(x_BTIHW, Normalized) else x_BTIHW
        return upsample_conv_reference(x, weight_OhwI, bias_O), None
    kernel, bias = _cast(folded(weight_OhwI, "upsampling"), bias_O, video.dtype)
    layout = Layout(size_of(x_BTIHW), upsample=True)
    return convolve(x_BTIHW, kernel, bias, layout, implementation=_of_convolution(implementation))


def upsample_conv_reference(
    x_BTIHW: Tensor, weight_OhwI: Tensor, bias_O: Tensor | None = None
) -> Tensor:
    """As the equation stands; returns [B, T, O, 2H, 2W]."""
    weight, bias = _cast(weight_OhwI, bias_O, x_BTIHW.dtype)
    up = F.interpolate(fold_frames(x_BTIHW), scale_factor=2.0, mode="nearest")
    frames = F.conv2d(up, conv2d_weight(weight), bias, padding=1)
    return unfold_frames(frames, x_BTIHW.shape[1])


def pooled(
    x_BTIHW: Tensor,
    weight_OkI: Tensor | Folded,
    bias_O: Tensor | None,
    pooling: Pooling,
    *,
    volume: bool,
    residual: Tensor | None,
    only_graph: bool,
    implementation: str | None,
) -> Tensor:
    """`conv_pool2d` and, of a `volume`, `conv_pool3d`."""
    _check_pooling(x_BTIHW, pooling)
    shape = (weight_OkI.kernel if isinstance(weight_OkI, Folded) else weight_OkI).shape
    if len(shape) != (5 if volume else 4):
        axes = "[O, kt, kh, kw, I]" if volume else "[O, kh, kw, I]"
        raise ValueError(f"the weight must be {axes}, not {[*shape]}")
    operator = POOL3D if volume else POOL2D
    implementation = operator.choose(implementation, x_BTIHW.device, x_BTIHW.dtype)
    if implementation == REFERENCE and not isinstance(weight_OkI, Folded):
        y_BTOHW = conv_pool_reference(x_BTIHW, weight_OkI, bias_O, pooling)
        return y_BTOHW if residual is None else y_BTOHW + residual
    how = pooling if volume else pooling[1:]
    kernel, bias = _cast(folded(weight_OkI, how), bias_O, x_BTIHW.dtype)
    layout = Layout(size_of(x_BTIHW), volume=volume, pooling=pooling)
    y_BTOHW, _ = convolve(
        x_BTIHW,
        kernel,
        bias,
        layout,
        residual=residual,
        only_graph=only_graph,
        implementation=_of_convolution(implementation),
    )
    return y_BTOHW


def conv_pool_reference(
    x_BTIHW: Tensor, weight_OkI: Tensor, bias_O: Tensor | None, pooling: Pooling = (1, 2, 2)
) -> Tensor:
    """As the equation stands, of a 2D or a 3D weight."""
    weight, bias = _cast(weight_OkI, bias_O, x_BTIHW.dtype)
    layout = Layout(size_of(x_BTIHW), volume=weight.ndim == 5)
    y_BTOHW, _ = convolve(x_BTIHW, weight, bias, layout, implementation=REFERENCE)
    return average_pool(y_BTOHW, pooling)


def average_pool(x_BTCHW: Tensor, pooling: Pooling = (1, 2, 2)) -> Tensor:
    """Mean over boxes of (frames, rows, columns); returns [B, T // pooling[0], C, H // 2, W // 2].

    A last frame, row or column without a partner is dropped. Raises ValueError for a video smaller
    than a box, and for another pooling than (1, 2, 2) and (2, 2, 2).

    >>> kernels.average_pool(torch.randn(2, 4, 8, 6, 6), (2, 2, 2)).shape
    torch.Size([2, 2, 8, 3, 3])
    """
    _check_pooling(x_BTCHW, pooling)
    if pooling == (2, 2, 2):
        # Not avg_pool3d, which knows no bf16 on a CPU.
        pairs = x_BTCHW[:, : x_BTCHW.shape[1] // 2 * 2].unflatten(1, (-1, 2))
        x_BTCHW = pairs.mean(dim=2)
    return unfold_frames(F.avg_pool2d(fold_frames(x_BTCHW), 2), x_BTCHW.shape[1])


def _of_convolution(implementation: str) -> str | None:
    """The convolution's implementation: its reference, or what it chooses itself."""
    return REFERENCE if implementation == REFERENCE else None


def _check_pooling(x_BTCHW: Tensor, pooling: Pooling) -> None:
    if pooling not in ((1, 2, 2), (2, 2, 2)):
        raise ValueError(f"pooling must be (1, 2, 2) or (2, 2, 2), not {pooling}")
    size = (x_BTCHW.shape[1], *x_BTCHW.shape[3:])
    if any(length < box for length, box in zip(size, pooling, strict=True)):
        raise ValueError(f"a video of {size} (frames, rows, columns) is smaller than {pooling}")


def _cast(
    weight: Tensor, bias_O: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    return weight.to(dtype), None if bias_O is None else bias_O.to(dtype)
