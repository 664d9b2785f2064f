"""The sides of an operator's benchmark, and the cases made of them.

- `ours`: what `kernels` runs by itself ("auto").
- `reference`: the composition of PyTorch operators that defines it, eager.
- `compiled`: the same under torch.compile.
- `plain`: for convolutions, the shortest way to write them with PyTorch's own, which on a GPU is
  cuDNN on channels-last tensors: what one would have without this project.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from benchmarks.calls import Call
from benchmarks.correctness import Function, check_call, gradients
from benchmarks.floors import Cost, operator_cost
from benchmarks.timing import cache_bytes, num_copies

Direction = Literal["forward", "forward_backward"]
OURS, REFERENCE, COMPILED, PLAIN = "ours", "reference", "compiled", "plain"


@dataclass
class Case:
    """One thing to be measured: what is compared, at which size, after which check."""

    operator: str
    shape: str
    direction: str
    dtype: torch.dtype
    cost: Cost | None
    check: Callable[[], None]
    """Raises `Refused`."""
    sides: Callable[[], dict[str, Callable[[], object]]]
    """Makes the sides, each to be called again and again; called after the check."""


def operator_case(
    call: Call, direction: Direction, device: torch.device, *, compiled: bool, plain: bool
) -> Case:
    """The case of one recorded call. `compiled` and `plain` add those sides."""
    functions = side_functions(call.operator, compiled=compiled, plain=plain)
    reference = functions[REFERENCE]
    checked = {name: function for name, function in functions.items() if name != REFERENCE}
    return Case(
        operator=call.operator,
        shape=call.name,
        direction=direction,
        dtype=call.x.dtype,
        cost=operator_cost(call, backward=direction != "forward"),
        check=partial(check_call, call, checked, reference, device),
        sides=partial(_rotating_sides, call, direction, functions, device),
    )


def side_functions(operator: str, *, compiled: bool, plain: bool) -> dict[str, Function]:
    """Each side as a function of the operator's arguments."""
    ours: Function = getattr(kernels, operator)
    functions = {OURS: ours, REFERENCE: _as_references(ours)}
    if compiled:
        # Dynamo keeps eight graphs of a function and runs the rest eagerly, without an error.
        torch._dynamo.reset()
        functions[COMPILED] = _as_references(torch.compile(ours, dynamic=False))
    if plain and operator in _PLAIN:
        functions[PLAIN] = _PLAIN[operator]
    return functions


def nothing_to_compare(operator: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a comparison with the reference alone would compare it with itself; None where not."""
    name = "convolution" if operator in ("conv2d", "separable_conv3d") else operator
    choice = kernels.implementations(device, dtype)[name]
    if choice.implementation != REFERENCE:
        return None
    return f"kernels.{operator} runs its reference on {device.type} ({choice.reason})"


def _as_references(function: Function) -> Function:
    def run(**arguments: Any) -> Tensor:
        with kernels.use(REFERENCE):
            return function(**arguments)

    return run


def _rotating_sides(
    call: Call, direction: Direction, functions: dict[str, Function], device: torch.device
) -> dict[str, Callable[[], object]]:
    """Every call of any side takes the next of several copies of the arguments."""
    copies = num_copies(call.num_bytes, cache_bytes(device))
    arguments = [call.draw(device, seed) for seed in range(copies)]
    with torch.no_grad():
        y = functions[REFERENCE](**arguments[0])
    upstream = [torch.randn_like(y) for _ in arguments]
    turn = itertools.cycle(zip(arguments, upstream, strict=True))

    def once(function: Function) -> object:
        given, dy = next(turn)
        if direction == "forward":
            with torch.no_grad():
                return function(**given)
        y = function(**given)
        return gradients(y, given, dy)

    return {name: partial(once, function) for name, function in functions.items()}


# --------------------------------------------------------------------------- plain PyTorch


def _plain_conv2d(
    x_BTIHW: Tensor,
    weight_OhwI: Tensor,
    bias_O: Tensor | None = None,
    *,
    residual_BTOHW: Tensor | None = None,
    skip: kernels.LowSkip | None = None,
) -> Tensor:
    weight, bias = _as(x_BTIHW, weight_OhwI.permute(0, 3, 1, 2), bias_O)
    y = F.conv2d(x_BTIHW.flatten(0, 1), weight, bias, padding="same")
    return _plus(y.unflatten(0, x_BTIHW.shape[:2]), residual_BTOHW, skip)


def _plain_upsample_conv(
    x_BTIHW: Tensor, weight_OhwI: Tensor, bias_O: Tensor | None = None
) -> Tensor:
    up = F.interpolate(x_BTIHW.flatten(0, 1), scale_factor=2.0, mode="nearest")
    return _plain_conv2d(up.unflatten(0, x_BTIHW.shape[:2]), weight_OhwI, bias_O)


def _plain_conv_pool2d(
    x_BTIHW: Tensor,
    weight_OhwI: Tensor,
    bias_O: Tensor | None = None,
    *,
    residual_BTOHW: Tensor | None = None,
) -> Tensor:
    y = F.avg_pool2d(_plain_conv2d(x_BTIHW, weight_OhwI, bias_O).flatten(0, 1), 2)
    return _plus(y.unflatten(0, x_BTIHW.shape[:2]), residual_BTOHW, None)


def _plain_conv_pool3d(
    x_BTIHW: Tensor,
    weight_OthwI: Tensor,
    bias_O: Tensor | None = None,
    *,
    residual_BTOHW: Tensor | None = None,
    pooling: kernels.Pooling = (1, 2, 2),
) -> Tensor:
    weight, bias = _as(x_BTIHW, weight_OthwI.permute(0, 4, 1, 2, 3), bias_O)
    y_BOTHW = F.conv3d(x_BTIHW.transpose(1, 2), weight, bias, padding="same")
    return _plus(F.avg_pool3d(y_BOTHW, pooling).transpose(1, 2), residual_BTOHW, None)


def _plain_separable_conv3d(
    x_BTIHW: Tensor,
    temporal_weight_OtI: Tensor,
    spatial_weight_OhwO: Tensor,
    bias_O: Tensor | None = None,
    *,
    residual_BTOHW: Tensor | None = None,
    skip: kernels.LowSkip | None = None,
) -> Tensor:
    temporal = temporal_weight_OtI.permute(0, 2, 1)[..., None, None]
    spatial = spatial_weight_OhwO.permute(0, 3, 1, 2)[:, :, None]
    mixed = F.conv3d(x_BTIHW.transpose(1, 2), temporal, padding="same")
    y = F.conv3d(mixed, spatial, bias_O, padding="same")
    return _plus(y.transpose(1, 2), residual_BTOHW, skip)


def _as(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weight.to(x.dtype), None if bias is None else bias.to(x.dtype)


def _plus(y: Tensor, residual: Tensor | None, skip: kernels.LowSkip | None) -> Tensor:
    y = y if residual is None else y + residual
    return y if skip is None else kernels.add_low_skip(y, skip)


_PLAIN: dict[str, Function] = {
    "conv2d": _plain_conv2d,
    "upsample_conv": _plain_upsample_conv,
    "conv_pool2d": _plain_conv_pool2d,
    "conv_pool3d": _plain_conv_pool3d,
    "separable_conv3d": _plain_separable_conv3d,
}
