"""What a convolution may add to its result besides a bias: x_l, and a shortcut that upsamples.

`LowSkip` is the injection of the low-resolution video x_l (SSW-GAN, upsampling stages):
y + 1x1conv(nearest_downsample(repeat_frames(x_l))). x_l reaches every block whose output is no
larger than x_l itself; it is never upsampled in space. It has three channels, so the projection
costs 2·3·C FLOPs and, unfused, one read and one write of y per element: a thing for the epilogue of
the convolution that makes y.

`UpsampledShortcut` is the shortcut of a block that upsamples (SSW-GAN, after BigGAN):
y + 1x1conv(up(x)), where up doubles rows and columns, x is the block's input and y its last
convolution. A 1x1 convolution commutes with up, so x is projected at its own size, a quarter of the
FLOPs, and a pixel of the projection is added to the four of y. Unfused, up of the projection would
be written and read again: 2.25 values moved for each of y, against 0.25.

Shapes: B batch, T frames of y, t frames of x_l (T = t · frame step), I input and O output channels;
y has H x W pixels, S = H·W, a shortcut's x half of each. Rows are [B, T, S, C], contiguous.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.common.layout import channels_last, conv2d_weight, fold_frames, unfold_frames

MOST_SUMMED = 2**31
"""Values: on CUDA, PyTorch's gradient of nearest upsampling refuses channels-last tensors of so
many."""


class LowSkip(NamedTuple):
    """A low-resolution video and the 1x1 convolution that brings it to a block's channels."""

    video: Tensor
    """x_l at its own size and length, [B, t, I, h, w]."""
    weight: Tensor
    """[O, 1, 1, I]."""
    bias: Tensor
    """[O]."""


def add_low_skip(y_BTOHW: Tensor, skip: LowSkip) -> Tensor:
    """Add the projected x_l to y, each of its frames repeated to cover y's.

    Raises ValueError when y is larger than x_l or one is not a whole multiple of the other.

    >>> y_BTOHW, low_BtIhw = torch.randn(2, 4, 8, 6, 6), torch.randn(2, 2, 3, 12, 12)
    >>> skip = kernels.LowSkip(low_BtIhw, torch.randn(8, 1, 1, 3), torch.zeros(8))
    >>> kernels.add_low_skip(y_BTOHW, skip).shape
    torch.Size([2, 4, 8, 6, 6])
    """
    projected_BtOHW, step = _projected(y_BTOHW, skip)
    apart = channels_last(y_BTOHW).unflatten(1, (-1, step))
    return (apart + projected_BtOHW[:, :, None]).flatten(1, 2)


def add_projected_(y_BTOHW: Tensor, skip: LowSkip) -> None:
    """The same in place, without derivatives."""
    projected_BtOHW, step = _projected(y_BTOHW, skip)
    y_BTOHW.unflatten(1, (-1, step)).add_(projected_BtOHW[:, :, None])


def low_skip_gradients(
    dy_BTOHW: Tensor, video_BtIhw: Tensor, weight_O11I: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Of x_l, the projection's weight and its bias, those that are wanted."""
    rows, columns, step = _steps(dy_BTOHW, video_BtIhw)
    dy_BtHWO = dy_BTOHW.unflatten(1, (-1, step)).sum(2).permute(0, 1, 3, 4, 2)
    low_BtHWI = video_BtIhw[..., ::rows, ::columns].permute(0, 1, 3, 4, 2)
    weight_OI = weight_O11I.flatten(1)
    dvideo = dweight = dbias = None
    if wanted[0]:
        dvideo = torch.zeros_like(video_BtIhw)
        dlow_BtHWI = dy_BtHWO @ weight_OI
        dvideo[..., ::rows, ::columns] = dlow_BtHWI.permute(0, 1, 4, 2, 3).to(dvideo.dtype)
    if wanted[1]:
        dweight = dy_BtHWO.flatten(0, 3).T @ low_BtHWI.to(dy_BtHWO.dtype).flatten(0, 3)
        dweight = dweight.view(weight_O11I.shape)
    if wanted[2]:
        dbias = dy_BtHWO.sum((0, 1, 2, 3))
    return [dvideo, dweight, dbias]


def _projected(y_BTOHW: Tensor, skip: LowSkip) -> tuple[Tensor, int]:
    """The projection of x_l at y's size, once per frame of x_l, which commutes with repeating it;
    and how often to repeat."""
    rows, columns, step = _steps(y_BTOHW, skip.video)
    low = skip.video[..., ::rows, ::columns].to(y_BTOHW.dtype)
    frames = F.conv2d(fold_frames(low), conv2d_weight(skip.weight), skip.bias)
    return unfold_frames(frames, low.shape[1]), step


def _steps(y_BTOHW: Tensor, video_BtIhw: Tensor) -> tuple[int, int, int]:
    """Rows of x_l per row of y, columns per column, and frames of y per frame of x_l."""
    num_frames, _, height, width = y_BTOHW.shape[1:]
    if len(video_BtIhw) != len(y_BTOHW):
        raise ValueError(f"x_l is of {len(video_BtIhw)} samples, the features of {len(y_BTOHW)}")
    low_frames, _, low_height, low_width = video_BtIhw.shape[1:]
    if low_height % height or low_width % width or num_frames % low_frames:
        raise ValueError(
            f"a {low_height}x{low_width}/{low_frames} video cannot be injected into features of "
            f"{height}x{width}/{num_frames}: frames may only be repeated, pixels only skipped"
        )
    return low_height // height, low_width // width, num_frames // low_frames


class UpsampledShortcut(NamedTuple):
    """A block's input and the 1x1 convolution that brings it to the block's output channels."""

    video: Tensor
    """x, [B, T, I, H / 2, W / 2]."""
    weight: Tensor
    """[O, 1, 1, I]."""
    bias: Tensor
    """[O]."""


def upsampled_shortcut(shortcut: UpsampledShortcut) -> Tensor:
    """As the equation stands, [B, T, O, H, W]."""
    up = F.interpolate(fold_frames(shortcut.video), scale_factor=2.0, mode="nearest")
    frames = F.conv2d(up, conv2d_weight(shortcut.weight), shortcut.bias)
    return unfold_frames(frames, shortcut.video.shape[1])


def add_upsampled(y_BTSO: Tensor, half_BTsO: Tensor, size: tuple[int, int]) -> Tensor:
    """y + up(half), y of H x W = `size`; differentiable."""
    return (_by_fours(y_BTSO, size) + _ones(half_BTsO, size)).view(y_BTSO.shape)


def add_upsampled_(y_BTSO: Tensor, half_BTsO: Tensor, size: tuple[int, int]) -> None:
    """The same in place, without derivatives."""
    _by_fours(y_BTSO, size).add_(_ones(half_BTsO, size))


def sums_of_four(dy_BTSO: Tensor, size: tuple[int, int]) -> Tensor:
    """The gradient of `half` in `add_upsampled`, [B, T, S / 4, O]; differentiable."""
    B, T, _, O = dy_BTSO.shape  # noqa: E741
    height, width = size
    frames = dy_BTSO.reshape(B * T, height, width, O).permute(0, 3, 1, 2)
    num_parts = min(B * T, -(-dy_BTSO.numel() // (MOST_SUMMED - 1)))
    sums = [
        torch.ops.aten.upsample_nearest2d_backward(
            part, [height, width], [len(part), O, height // 2, width // 2], 2.0, 2.0
        )
        for part in frames.chunk(max(1, num_parts))
    ]
    total = sums[0] if len(sums) == 1 else torch.cat(sums)
    return total.permute(0, 2, 3, 1).reshape(B, T, -1, O)


def _by_fours(y_BTSO: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, T, H / 2, 2, W / 2, 2, O], a view."""
    height, width = size
    return y_BTSO.view(*y_BTSO.shape[:2], height // 2, 2, width // 2, 2, y_BTSO.shape[3])


def _ones(half_BTsO: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, T, H / 2, 1, W / 2, 1, O], a view."""
    height, width = size
    return half_BTsO.view(*half_BTsO.shape[:2], height // 2, 1, width // 2, 1, half_BTsO.shape[3])
