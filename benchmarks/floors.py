"""The least bytes and FLOPs of every operator, from the formulas in its file's docstring.

Bytes: everything that an operator is given or returns is read or written once, and what its
docstring says must be read again is counted again. FLOPs are two per multiply-add, of the folded
form where there is one: a share of the matmul rate is then of work that is really needed.

Shapes: B batch, T frames, I input and O output channels, H x W pixels, k taps.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from benchmarks.calls import Call
from kernels import UpsampledShortcut


class Cost(NamedTuple):
    """Of one call."""

    num_bytes: int
    flops: int

    def __add__(self, other: object) -> "Cost":
        """Both, one after the other."""
        if not isinstance(other, Cost):
            return NotImplemented
        return Cost(self.num_bytes + other.num_bytes, self.flops + other.flops)


def operator_cost(call: Call, *, backward: bool) -> Cost:
    """Forward pass, and with `backward` both. Raises KeyError for an operator without formulas."""
    forward, back = _FORMULAS[call.operator](call)
    return forward + back if backward else forward


def spectral_cost(num_values: int, dtype_bytes: int, *, normalize: bool, backward: bool) -> Cost:
    """One power iteration of weights of `num_values` in all; then Ŵ of `dtype_bytes`; then dW.

    kernels/spectral_norm/network.py: all weights together fit no cache, so W is read twice, and dK.
    """
    cost = Cost(8 * num_values, 4 * num_values)
    if normalize:
        cost += Cost((8 + dtype_bytes) * num_values, 4 * num_values)
    if backward:
        cost += Cost((8 + 2 * dtype_bytes) * num_values, 6 * num_values)
    return cost


def _frame_norm(call: Call) -> tuple[Cost, Cost]:
    values, size = call.x.numel(), call.x.element_size()
    added = 1 if call.arguments.get("residual") is not None else 0
    return Cost((3 + added) * size * values, 8 * values), Cost(5 * size * values, 14 * values)


def _conv2d(call: Call) -> tuple[Cost, Cost]:
    weight = call.arguments["weight_OhwI"]
    return _convolution(call, _pixels(call) * weight.shape[0], 2 * _pixels(call) * weight.numel())


def _upsample_conv(call: Call) -> tuple[Cost, Cost]:
    """32·I·O per input pixel (folded)."""
    O, _, _, I = call.arguments["weight_OhwI"].shape  # noqa: E741
    return _convolution(call, 4 * _pixels(call) * O, 32 * _pixels(call) * I * O)


def _conv_pool2d(call: Call) -> tuple[Cost, Cost]:
    """8·I·O per input pixel (16 taps of stride 2)."""
    O, _, _, I = call.arguments["weight_OhwI"].shape  # noqa: E741
    return _convolution(call, _pixels(call) // 4 * O, 8 * _pixels(call) * I * O)


def _conv_pool3d(call: Call) -> tuple[Cost, Cost]:
    """24·I·O per input pixel where time is kept, 16·I·O where it is pooled."""
    O, *_, I = call.arguments["weight_OthwI"].shape  # noqa: E741
    step = call.arguments.get("pooling", (1, 2, 2))[0]
    outputs = _pixels(call) // (4 * step) * O
    return _convolution(call, outputs, {1: 24, 2: 16}[step] * _pixels(call) * I * O)


def _separable_conv3d(call: Call) -> tuple[Cost, Cost]:
    """Two halves; what lies between them is written and read, as the docstring counts."""
    outputs = _pixels(call) * call.arguments["temporal_weight_OtI"].shape[0]
    weights = sum(weight.numel() for weight in call.weights.values())
    forward, backward = _convolution(call, outputs, 2 * _pixels(call) * weights)
    between = Cost(2 * outputs * call.x.element_size(), 0)
    return forward + between, backward + between


def _conv_gru(call: Call) -> tuple[Cost, Cost]:
    """54·C² for the half that reads x, once where x is constant, and for that which reads h."""
    B, T, C, H, W = call.x.shape
    size, frame, weights = call.x.element_size(), B * C * H * W, 54 * C * C
    x_frames = 1 if call.constant_input else T
    flops = 54 * C * frame * (x_frames + T - 1)
    forward = Cost(size * (frame * (x_frames + T) + weights), flops)
    # x, every h and its gradient are read, dx is written.
    return forward, Cost(size * (frame * 2 * (x_frames + T) + 2 * weights), 2 * flops)


def _convolution(call: Call, outputs: int, flops: int) -> tuple[Cost, Cost]:
    """Forward x, weight, what is added, y; backward dy, x and the weight, dx and dW."""
    size, x = call.x.element_size(), call.x
    weights = sum(_bytes(weight) for weight in call.weights.values())
    residual = call.arguments.get("residual_BTOHW")
    shortcut = Cost(0, 0), Cost(0, 0)
    added = 0
    if isinstance(residual, UpsampledShortcut):
        shortcut = _upsampled_shortcut(residual)
    elif residual is not None:
        added = residual.numel()
    forward = Cost(size * (x.numel() + outputs + added) + weights, flops)
    inputs = 2 if x.requires_grad else 1
    halves = 2 if x.requires_grad else 1  # dW, and dx where it is wanted
    backward = Cost(size * (outputs + inputs * x.numel()) + 2 * weights, halves * flops)
    return forward + shortcut[0], backward + shortcut[1]


def _upsampled_shortcut(shortcut: UpsampledShortcut) -> tuple[Cost, Cost]:
    """2·I·O per pixel of its own; its projection is written and read in either direction."""
    video, weight, _ = shortcut
    O, *_, I = weight.shape  # noqa: E741
    pixels, size = video.numel() // I, video.element_size()
    forward = Cost(size * pixels * (I + 2 * O) + _bytes(weight), 2 * pixels * I * O)
    halves = 2 if video.requires_grad else 1
    return forward, Cost(
        size * pixels * (halves * I + 2 * O) + 2 * _bytes(weight), halves * forward.flops
    )


def _pixels(call: Call) -> int:
    B, T, _, H, W = call.x.shape
    return B * T * H * W


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


_FORMULAS: dict[str, Callable[[Call], tuple[Cost, Cost]]] = {
    "frame_norm": _frame_norm,
    "conv2d": _conv2d,
    "upsample_conv": _upsample_conv,
    "conv_pool2d": _conv_pool2d,
    "conv_pool3d": _conv_pool3d,
    "separable_conv3d": _separable_conv3d,
    "conv_gru": _conv_gru,
}
