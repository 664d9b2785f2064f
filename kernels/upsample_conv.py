"""Nearest-neighbour 2x upsampling in space, then a convolution (3x3 or 1x1).

y = W * up(x) + b, the first half of a generator's upsampling block (SSW-GAN, appendix A; BigGAN).

Shapes: B batch, T frames, I input and O output channels, H x W input pixels, outputs 2H x 2W.
Weights [O, k, k, I]. FLOPs as computed here: 2·k²·I·O per *output* pixel; since up(x) repeats
pixels, 16 of the 36 taps per input pixel would do for k = 3, and one of four for k = 1.
"""

from torch import Tensor
from torch.nn import functional as F

from kernels.layout import conv2d_weight, fold_frames, unfold_frames


def upsample_conv(x_BTIHW: Tensor, weight_OhwI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Upsample every frame and convolve it; returns [B, T, O, 2H, 2W]."""
    upsampled = F.interpolate(fold_frames(x_BTIHW), scale_factor=2.0, mode="nearest")
    padding = weight_OhwI.shape[1] // 2
    frames = F.conv2d(upsampled, conv2d_weight(weight_OhwI), bias_O, padding=padding)
    return unfold_frames(frames, x_BTIHW.shape[1])
