"""The least that the convolutions cost, from the formulas in their docstrings.

Shapes: B batch, T frames, I input and O output channels, H x W pixels, k taps; weights have their
output channels first and their input channels last.
"""

from typing import Any

from torch import Tensor

from kernels.common.floor import Cost, Floor
from kernels.convolution.terms import UpsampledShortcut

Residual = Tensor | UpsampledShortcut | None


def conv2d_floor(
    x_BTIHW: Tensor, weight_OhwI: Tensor, residual_BTOHW: Residual = None, **_: Any
) -> Floor:
    """2·k·I·O per pixel."""
    pixels, O = _pixels(x_BTIHW), weight_OhwI.shape[0]  # noqa: E741
    flops = 2 * pixels * weight_OhwI.numel()
    return _floor(x_BTIHW, [weight_OhwI], pixels * O, flops, residual_BTOHW)


def upsample_conv_floor(x_BTIHW: Tensor, weight_OhwI: Tensor, **_: Any) -> Floor:
    """32·I·O per input pixel (folded)."""
    pixels, O, I = _pixels(x_BTIHW), weight_OhwI.shape[0], weight_OhwI.shape[-1]  # noqa: E741
    return _floor(x_BTIHW, [weight_OhwI], 4 * pixels * O, 32 * pixels * I * O)


def conv_pool2d_floor(
    x_BTIHW: Tensor, weight_OhwI: Tensor, residual_BTOHW: Residual = None, **_: Any
) -> Floor:
    """8·I·O per input pixel (16 taps of stride 2)."""
    pixels, O, I = _pixels(x_BTIHW), weight_OhwI.shape[0], weight_OhwI.shape[-1]  # noqa: E741
    return _floor(x_BTIHW, [weight_OhwI], pixels // 4 * O, 8 * pixels * I * O, residual_BTOHW)


def conv_pool3d_floor(
    x_BTIHW: Tensor,
    weight_OthwI: Tensor,
    residual_BTOHW: Residual = None,
    pooling: tuple[int, int, int] = (1, 2, 2),
    **_: Any,
) -> Floor:
    """24·I·O per input pixel where time is kept, 16·I·O where it is pooled."""
    pixels, O, I = _pixels(x_BTIHW), weight_OthwI.shape[0], weight_OthwI.shape[-1]  # noqa: E741
    step = pooling[0]
    flops = {1: 24, 2: 16}[step] * pixels * I * O
    return _floor(x_BTIHW, [weight_OthwI], pixels // (4 * step) * O, flops, residual_BTOHW)


def separable_conv3d_floor(
    x_BTIHW: Tensor,
    temporal_weight_OtI: Tensor,
    spatial_weight_OhwO: Tensor,
    residual_BTOHW: Residual = None,
    **_: Any,
) -> Floor:
    """Two halves; what lies between them is written and read, as the docstring counts."""
    weights = [temporal_weight_OtI, spatial_weight_OhwO]
    outputs = _pixels(x_BTIHW) * spatial_weight_OhwO.shape[0]
    flops = 2 * _pixels(x_BTIHW) * sum(weight.numel() for weight in weights)
    forward, backward = _floor(x_BTIHW, weights, outputs, flops, residual_BTOHW)
    between = Cost(2 * outputs * x_BTIHW.element_size(), 0)
    return Floor(forward + between, backward + between)


def _floor(
    x: Tensor, weights: list[Tensor], outputs: int, flops: int, residual: Residual = None
) -> Floor:
    """Forward x, weights, what is added, y; backward dy, x and the weights, dx and dW."""
    size, weight_bytes = x.element_size(), sum(weight.nbytes for weight in weights)
    added = residual.nbytes if isinstance(residual, Tensor) else 0
    forward = Cost(x.nbytes + size * outputs + added + weight_bytes, flops)
    halves = 2 if x.requires_grad else 1  # dW, and dx where it is wanted
    backward = Cost(size * outputs + halves * x.nbytes + 2 * weight_bytes, halves * flops)
    if isinstance(residual, UpsampledShortcut):
        shortcut = _shortcut_floor(*residual)
        return Floor(forward + shortcut.forward, backward + shortcut.backward)
    return Floor(forward, backward)


def _shortcut_floor(video: Tensor, weight: Tensor, _: Tensor | None) -> Floor:
    """2·I·O per pixel of its own; its projection is written and read in either direction."""
    pixels, O, I = _pixels(video), weight.shape[0], weight.shape[-1]  # noqa: E741
    between, flops = 2 * video.element_size() * pixels * O, 2 * pixels * I * O
    halves = 2 if video.requires_grad else 1
    return Floor(
        Cost(video.nbytes + between + weight.nbytes, flops),
        Cost(halves * video.nbytes + between + 2 * weight.nbytes, halves * flops),
    )


def _pixels(x_BTIHW: Tensor) -> int:
    return x_BTIHW.numel() // x_BTIHW.shape[2]
