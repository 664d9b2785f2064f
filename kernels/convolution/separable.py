"""Separable 3D convolution: three taps in time, then 3x3 in space.

y = W_space * (W_time * x) + b [+ residual] [+ projected x_l], "same" zero padding.
SSW-GAN, upsampling stages: it stands for one convolution of the residual block that replaces the
ConvGRU in upsampling stages. Between the two halves there is no bias and no nonlinearity.

Shapes: B batch, T frames, I input and O output channels, H x W pixels. Weights: time [O, 3, I],
space [O, 3, 3, O]. FLOPs: 2·(3·I·O + 9·O²) per output pixel, against 54·I·O of a full 3x3x3.
Bytes: x once, y once, and the intermediate twice as long as the halves are separate.
"""

from torch import Tensor

from kernels.convolution import conv2d, conv2d_with_moments
from kernels.convolution.fused import Moments, Normalized, convolve, size_of
from kernels.convolution.low_skip import LowSkip
from kernels.convolution.pytorch import Layout


def separable_conv3d(
    x_BTIHW: Tensor | Normalized,
    temporal_weight_OtI: Tensor,
    spatial_weight_OhwO: Tensor,
    bias_O: Tensor | None = None,
    *,
    residual_BTOHW: Tensor | None = None,
    skip: LowSkip | None = None,
    impl: str | None = None,
) -> Tensor:
    """Returns [B, T, O, H, W]; `residual` and `skip` are added after the spatial half.

    Kept for backward: x, or what it is the norm of, and the intermediate. `impl` as in
    `kernels.dispatch`. Raises ValueError for an x_l that does not fit.
    """
    mixed_BTOHW = _over_time(x_BTIHW, temporal_weight_OtI, impl)
    return conv2d(
        mixed_BTOHW,
        spatial_weight_OhwO,
        bias_O,
        residual_BTOHW=residual_BTOHW,
        skip=skip,
        impl=impl,
    )


def separable_conv3d_with_moments(
    x_BTIHW: Tensor | Normalized,
    temporal_weight_OtI: Tensor,
    spatial_weight_OhwO: Tensor,
    bias_O: Tensor | None = None,
    *,
    residual_BTOHW: Tensor | None = None,
    skip: LowSkip | None = None,
    only_graph: bool = False,
    wanted: bool = True,
    impl: str | None = None,
) -> tuple[Tensor, Moments | None]:
    """As `separable_conv3d`, and the moments of the result if `wanted` and where they cost little.

    `only_graph`: as `kernels.convolution.fused.convolve`'s.
    """
    mixed_BTOHW = _over_time(x_BTIHW, temporal_weight_OtI, impl)
    return conv2d_with_moments(
        mixed_BTOHW,
        spatial_weight_OhwO,
        bias_O,
        residual_BTOHW=residual_BTOHW,
        skip=skip,
        only_graph=only_graph,
        wanted=wanted,
        impl=impl,
    )


def _over_time(
    x_BTIHW: Tensor | Normalized, temporal_weight_OtI: Tensor, impl: str | None
) -> Tensor:
    """The temporal half.

    With H and W as one axis it is a (3, 1) conv2d on a channels-last view, with no copy: conv2d has
    the better kernels, and bf16 conv3d is wrong in some cuDNN versions.
    """
    layout = Layout(size_of(x_BTIHW), columns=True)
    mixed_BTOHW, _ = convolve(x_BTIHW, temporal_weight_OtI.unsqueeze(2), None, layout, impl=impl)
    return mixed_BTOHW
