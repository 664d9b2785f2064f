r"""The shortcut of a block that upsamples: y + 1x1conv(up(x)), up to nearest neighbours, twice.

SSW-GAN, the upsampling block (after BigGAN): x is the block's input and y its last convolution. A
1x1 convolution commutes with up, so x is projected at its own size, a quarter of the FLOPs, and a
pixel of the projection is added to the four of y by whatever adds the residual to y. Unfused, up
of the projection would be written and read again: 2.25 values moved for each of y, against 0.25.

Shapes: B batch, T frames, I input and O output channels; y has H x W pixels, S = H·W, x half of
each. Rows are [B, T, S, C], contiguous.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.common.layout import conv2d_weight, fold_frames, unfold_frames

MOST_SUMMED = 2**31
"""Values: on CUDA, PyTorch's gradient of nearest upsampling, channels last, refuses as many."""


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
