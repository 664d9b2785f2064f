r"""Injection of the low-resolution video x_l: y + 1x1conv(nearest_downsample(repeat_frames(x_l))).

SSW-GAN, upsampling stages. x_l reaches every block whose output is no larger than
x_l itself; it is never upsampled in space. It has three channels, so the projection costs
2·3·C FLOPs and, unfused, one read and one write of y per element: a thing for the epilogue of
the convolution that makes y, which is why convolutions here take a `LowSkip`.

Shapes: B batch, T frames of y, t frames of x_l (T = t · frame step), O channels, H x W pixels.
"""

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from kernels.layout import channels_last, conv2d_weight, fold_frames, unfold_frames


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
    """
    num_frames, _, height, width = y_BTOHW.shape[1:]
    low_frames, _, low_height, low_width = skip.video.shape[1:]
    if low_height % height or low_width % width or num_frames % low_frames:
        raise ValueError(
            f"a {low_height}x{low_width}/{low_frames} video cannot be injected into features of "
            f"{height}x{width}/{num_frames}: frames may only be repeated, pixels only skipped"
        )
    low = skip.video[..., :: low_height // height, :: low_width // width].to(y_BTOHW.dtype)
    frames = F.conv2d(fold_frames(low), conv2d_weight(skip.weight), skip.bias)
    projected_BtOHW = unfold_frames(frames, low_frames)
    # The projection commutes with repeating frames, so it is computed once per frame of x_l.
    step = num_frames // low_frames
    return (
        channels_last(y_BTOHW).unflatten(1, (low_frames, step)) + projected_BtOHW[:, :, None]
    ).flatten(1, 2)
