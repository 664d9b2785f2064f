"""The sides of an operator's benchmark, and the cases made of them.

- `ours`: what `kernels` runs by itself ("auto").
- `reference`: the composition of PyTorch operators that defines it, eager.
- `compiled`: the same under torch.compile.
- `plain`: for convolutions, `plain.py`'s form of them, which on a GPU is cuDNN on channels-last
  tensors: what one would have without this project.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

import kernels
from benchmarks.calls import Call
from benchmarks.correctness import Function, check_call, gradients
from benchmarks.floors import Cost, operator_cost
from benchmarks.plain import PlainOperators
from benchmarks.timing import cache_bytes, num_copies

Direction = Literal["forward", "forward_backward"]
OURS, REFERENCE, COMPILED, PLAIN = "ours", "reference", "compiled", "plain"
_WITH_PLAIN_FORM = ("conv2d", "upsample_conv", "conv_pool2d", "conv_pool3d", "separable_conv3d")


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
    patience: float = 1.0
    """Times what the session gives a case. More for what few rounds do not settle."""


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
    if plain and operator in _WITH_PLAIN_FORM:
        functions[PLAIN] = getattr(PlainOperators(channels_last=True), operator)
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
