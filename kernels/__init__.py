"""The operators of SSW-GAN's networks, a folder each: equation, costs, implementations.

Models call `kernels.<op>(...)` and no function beneath it, so that an operator's implementation
can change without a change in any model. Nothing here knows what a GAN is. Every operator has a
reference, a composition of differentiable PyTorch operators that works in fp64 and to any order;
`kernels.dispatch` says how it is chosen among what else there is.
"""

from kernels.conv_gru import conv_gru
from kernels.convolution import (
    Fold,
    Folded,
    LowSkip,
    Measured,
    Moments,
    Normalized,
    Pooling,
    UpsampledShortcut,
    add_low_skip,
    average_pool,
    conv2d,
    conv3d,
    conv_pool2d,
    conv_pool3d,
    separable_conv3d,
    upsample_conv,
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
    "Folded",
    "ImplementationError",
    "LowSkip",
    "Measured",
    "Moments",
    "Normalized",
    "Pooling",
    "UpsampledShortcut",
    "add_low_skip",
    "average_pool",
    "chosen",
    "conv2d",
    "conv3d",
    "conv_gru",
    "conv_pool2d",
    "conv_pool3d",
    "frame_norm",
    "frame_statistics",
    "implementations",
    "meta_as",
    "power_iteration_",
    "separable_conv3d",
    "set_default",
    "spectral_normalize",
    "spectral_normalize_all",
    "upsample_conv",
    "use",
]
