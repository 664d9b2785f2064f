"""PyTorch's convolution for `kernels.convolution`, its gradients, and the terms after it.

Shapes as there: x is rows [B, T, S, I], contiguous, W [O, a, b, I] as it is kept.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.low_skip import LowSkip, add_projected_
from kernels.upsampled_shortcut import add_upsampled_


class Layout(NamedTuple):
    """What a convolution slides over, and how; it pads with zeros to the same size."""

    size: tuple[int, int]
    """H, W of x."""
    columns: bool = False
    """Over time and [H·W] instead of over H and W."""
    upsample: bool = False
    """Transposed, 4x4 with stride 2: `folding.upsampling_kernel`'s."""

    @property
    def out_size(self) -> tuple[int, int]:
        """H, W of y."""
        scale = 2 if self.upsample else 1
        return scale * self.size[0], scale * self.size[1]


def convolution(
    layout: Layout, x_BTSI: Tensor, weight_OabI: Tensor, bias_O: Tensor | None
) -> Tensor:
    """W * x + b, [B, T, S', O]; differentiable."""
    image, kernel = _as_image(layout, layout.size, x_BTSI), _as_kernel(layout, weight_OabI)
    stride, padding, *_ = _numbers(layout, weight_OabI)
    # Not aten's operator by name, which on a CPU is called 25 µs more slowly.
    convolve = F.conv_transpose2d if layout.upsample else F.conv2d
    return _as_rows(layout, convolve(image, kernel, bias_O, stride, padding), x_BTSI)


def gradients(
    layout: Layout,
    dy_BTSO: Tensor,
    x_BTSI: Tensor,
    weight_OabI: Tensor,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of x, the weight and the bias."""
    dx, dkernel, dbias = torch.ops.aten.convolution_backward.default(
        _as_image(layout, layout.out_size, dy_BTSO), _as_image(layout, layout.size, x_BTSI),
        _as_kernel(layout, weight_OabI), [weight_OabI.shape[0]],
        *_numbers(layout, weight_OabI), list(wanted),
    )  # fmt: skip
    as_kept = (1, 2, 3, 0) if layout.upsample else (0, 2, 3, 1)
    return (
        None if dx is None else _as_rows(layout, dx, x_BTSI),
        None if dkernel is None else dkernel.permute(as_kept),
        dbias,
    )


def add_terms_(
    y_BTSO: Tensor, residual_BTSO: Tensor | None, skip: LowSkip | None, size: tuple[int, int]
) -> None:
    """In place and without derivatives; a residual of a quarter of y's pixels is upsampled."""
    if residual_BTSO is not None and residual_BTSO.shape == y_BTSO.shape:
        changeable(y_BTSO).add_(residual_BTSO)
    elif residual_BTSO is not None:
        add_upsampled_(y_BTSO, residual_BTSO, size)
    if skip is not None:
        add_projected_(as_video(y_BTSO, size), skip)


def changeable(y: Tensor) -> Tensor:
    """A view, to change y in place by where y is the result of an autograd Function.

    torch 2.11's compiler gives the Function's inputs a gradient of zero where an operator gave back
    the very result that it was given, as one in place does.
    """
    return y.view_as(y)


def as_video(y_BTSC: Tensor, size: tuple[int, int]) -> Tensor:
    """Rows as [B, T, C, H, W], a view."""
    B, T, _, C = y_BTSC.shape
    return y_BTSC.view(B, T, *size, C).permute(0, 1, 4, 2, 3)


def _numbers(layout: Layout, weight_OabI: Tensor) -> tuple[Any, ...]:
    """Stride, padding, dilation, transposed, output padding and groups."""
    if layout.upsample:
        return [2, 2], [1, 1], [1, 1], True, [0, 0], 1
    return [1, 1], [size // 2 for size in weight_OabI.shape[1:3]], [1, 1], False, [0, 0], 1


def _as_image(layout: Layout, size: tuple[int, int], x_BTSC: Tensor) -> Tensor:
    """A channels-last view: frames [B*T, C, H, W], or [B, C, T, S]."""
    B, T, _, C = x_BTSC.shape
    image = x_BTSC if layout.columns else x_BTSC.reshape(B * T, *size, C)
    return image.permute(0, 3, 1, 2)


def _as_rows(layout: Layout, y_NChw: Tensor, like_BTSC: Tensor) -> Tensor:
    """[B, T, S', C], contiguous again."""
    B, T, _, _ = like_BTSC.shape
    _, C, height, width = y_NChw.shape
    num_pixels = width if layout.columns else height * width
    return y_NChw.permute(0, 2, 3, 1).contiguous().view(B, T, num_pixels, C)


def _as_kernel(layout: Layout, weight_OabI: Tensor) -> Tensor:
    """PyTorch's [O, I, a, b], of a transposed convolution [I, O, a, b]."""
    return weight_OabI.permute((3, 0, 1, 2) if layout.upsample else (0, 3, 1, 2))
