"""A convolution, then 2x2 average pooling in space: how a discriminator's block ends.

y = pool(W * x + b) [+ residual]. In 3D the pooling is (1, 2, 2): time is kept, so that clips of
three frames reach the scores (our decision; the paper says only "average pooling").

Shapes: B batch, T frames, I input and O output channels, H x W pixels, outputs H/2 x W/2.
Weights [O, 3, 3, I] and [O, 3, 3, 3, I]. FLOPs as computed here: 2·k·I·O per *input* pixel (k = 9
or 27 taps); a 4x4 kernel of stride 2 would do with 16/36 of it.
"""

from torch import Tensor
from torch.nn import functional as F

from kernels.conv import add_terms, conv2d, conv3d
from kernels.layout import fold_frames, unfold_frames


def average_pool(x_BTCHW: Tensor) -> Tensor:
    """Mean of every 2x2 pixels of every frame; returns [B, T, C, H // 2, W // 2]."""
    return unfold_frames(F.avg_pool2d(fold_frames(x_BTCHW), 2), x_BTCHW.shape[1])


def conv_pool2d(
    x_BTIHW: Tensor,
    weight_OhwI: Tensor,
    bias_O: Tensor | None = None,
    *,
    residual_BTOHW: Tensor | None = None,
) -> Tensor:
    """Convolve every frame by itself, pool, add the (already pooled) residual."""
    return add_terms(average_pool(conv2d(x_BTIHW, weight_OhwI, bias_O)), residual_BTOHW, None)


def conv_pool3d(
    x_BTIHW: Tensor,
    weight_OthwI: Tensor,
    bias_O: Tensor | None = None,
    *,
    residual_BTOHW: Tensor | None = None,
) -> Tensor:
    """Convolve in time and space, pool in space, add the (already pooled) residual."""
    return add_terms(average_pool(conv3d(x_BTIHW, weight_OthwI, bias_O)), residual_BTOHW, None)
