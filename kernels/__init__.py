"""The operators of SSW-GAN's networks, one file each: equation, costs, plain PyTorch form.

Models call `kernels.<op>(...)` and nothing beneath it, so that an operator's implementation can
change without a change in any model. Nothing here knows what a GAN is. Every operator has a
reference, a composition of differentiable PyTorch operators that works in fp64 and to any order;
`kernels.dispatch` says how it is chosen among what else there is.
"""

from kernels.conv_gru import conv_gru, conv_gru_reference
from kernels.convolution import conv2d, conv2d_with_moments, conv3d
from kernels.convolution.folding import Fold
from kernels.convolution.fused import Moments, Normalized
from kernels.convolution.low_skip import LowSkip, add_low_skip
from kernels.convolution.pooling import (
    Pooling,
    average_pool,
    conv_pool2d,
    conv_pool2d_reference,
    conv_pool3d,
    conv_pool3d_reference,
)
from kernels.convolution.separable import separable_conv3d, separable_conv3d_with_moments
from kernels.convolution.upsampled_shortcut import UpsampledShortcut
from kernels.convolution.upsampling import (
    upsample_conv,
    upsample_conv_reference,
    upsample_conv_with_moments,
)
from kernels.dispatch import (
    ImplementationError,
    chosen,
    implementations,
    meta_as,
    set_default,
    use,
)
from kernels.frame_norm import frame_norm, frame_statistics
from kernels.spectral_norm import power_iteration_, spectral_normalize, spectral_normalize_all

__all__ = [
    "Fold",
    "ImplementationError",
    "LowSkip",
    "Moments",
    "Normalized",
    "Pooling",
    "UpsampledShortcut",
    "add_low_skip",
    "average_pool",
    "chosen",
    "conv2d",
    "conv2d_with_moments",
    "conv3d",
    "conv_gru",
    "conv_gru_reference",
    "conv_pool2d",
    "conv_pool2d_reference",
    "conv_pool3d",
    "conv_pool3d_reference",
    "frame_norm",
    "frame_statistics",
    "implementations",
    "meta_as",
    "power_iteration_",
    "separable_conv3d",
    "separable_conv3d_with_moments",
    "set_default",
    "spectral_normalize",
    "spectral_normalize_all",
    "upsample_conv",
    "upsample_conv_reference",
    "upsample_conv_with_moments",
    "use",
]
