"""Every operator with a video as its input, at the sizes that the networks call it with.

Sides:

- `ours`: what `kernels` runs by itself ("auto").
- `reference`: the composition of PyTorch operators that defines it, eager.
- `compiled`: the same under torch.compile.
- `plain`: of a convolution, what `plain.py` has for it, which on a GPU is cuDNN on channels-last
  tensors: what one would have without this project.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import kernels
from benchmarks.calls import Call, Network, kinetics, network_calls
from benchmarks.correctness import Function, check_call, gradients
from benchmarks.plain import PlainOperators
from benchmarks.session import COMPILED, OURS, REFERENCE, Case, Session
from benchmarks.timing import Run, Sides, cache_bytes, num_copies
from kernels.common.floor import Cost, Floor
from kernels.conv_gru.floor import conv_gru_floor
from kernels.convolution.floor import (
    conv2d_floor,
    conv_pool2d_floor,
    conv_pool3d_floor,
    separable_conv3d_floor,
    upsample_conv_floor,
)
from kernels.frame_norm.floor import frame_norm_floor

Direction = Literal["forward", "forward_backward"]
PLAIN = "plain"
OPERATORS: dict[str, tuple[int, Network, Callable[..., Floor]]] = {
    "frame_norm": (2, "generator", frame_norm_floor),
    "conv_gru": (1, "generator", conv_gru_floor),  # at 4x4 pixels x is the same at every time step
    # With the residual, and with x_l where it is injected.
    "separable_conv3d": (2, "generator", separable_conv3d_floor),
    "upsample_conv": (2, "generator", upsample_conv_floor),
    "conv2d": (2, "generator", conv2d_floor),
    "conv_pool2d": (2, "discriminators", conv_pool2d_floor),
    "conv_pool3d": (2, "discriminators", conv_pool3d_floor),  # temporal and matching
}
"""Of which stage and network the calls are, and the least that they cost."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every recorded call in both directions; with --quick the middle one of each operator."""
    quick = metafunc.config.getoption("quick")
    config, found = kinetics(reduced=not torch.cuda.is_available()), []
    for operator, (stage_number, network, _) in OPERATORS.items():
        calls = network_calls(config, stage_number, operator, network)
        found += [calls[(len(calls) - 1) // 2]] if quick else calls
    metafunc.parametrize("call", found, ids=[f"{call.operator}-{call.name}" for call in found])
    directions = ["forward_backward"] if quick else ["forward", "forward_backward"]
    metafunc.parametrize("direction", directions)


def test_operator(session: Session, benchmark: Any, call: Call, direction: Direction) -> None:
    """Measure, where there is something to compare with."""
    on_gpu = session.device.type == "cuda"
    nothing = nothing_to_compare(call.operator, session.device, call.x.dtype)
    if nothing is not None and not on_gpu:
        pytest.skip(nothing)
    functions = side_functions(call.operator, compiled=session.compiled, plain=on_gpu)
    checked = dict(functions)
    reference = checked.pop(REFERENCE)
    case = Case(
        operator=call.operator,
        shape=call.name,
        direction=direction,
        dtype=call.x.dtype,
        cost=operator_cost(call, backward=direction != "forward"),
        check=partial(check_call, call, checked, reference, session.device),
        sides=partial(rotating_sides, call, direction, functions, session.device),
    )
    session.run(case, benchmark)


def operator_cost(call: Call, *, backward: bool) -> Cost:
    """At least: of the forward pass, and with `backward` of both."""
    *_, floor_of = OPERATORS[call.operator]
    floor = floor_of(**call.arguments)
    return floor.forward + floor.backward if backward else floor.forward


def side_functions(operator: str, *, compiled: bool, plain: bool) -> dict[str, Function]:
    """Each side as a function of the operator's arguments."""
    ours: Function = getattr(kernels, operator)

    def as_reference(function: Function) -> Function:
        def run(**arguments: Any) -> Tensor:
            with kernels.use(REFERENCE):
                return function(**arguments)

        return run

    functions = {OURS: ours, REFERENCE: as_reference(ours)}
    if compiled:
        # Dynamo keeps eight graphs of a function and runs the rest eagerly, without an error.
        torch._dynamo.reset()
        functions[COMPILED] = as_reference(torch.compile(ours, dynamic=False))
    if plain and operator not in ("frame_norm", "conv_gru"):
        functions[PLAIN] = getattr(PlainOperators(channels_last=True), operator)
    return functions


def nothing_to_compare(operator: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a comparison with the reference alone would compare it with itself; None where not."""
    name = "convolution" if operator in ("conv2d", "separable_conv3d") else operator
    choice = kernels.implementations(device, dtype)[name]
    if choice.implementation != REFERENCE:
        return None
    return f"kernels.{operator} runs its reference on {device.type} ({choice.reason})"


def one_pass(
    direction: Direction, function: Function, arguments: dict[str, Any], dy: Tensor
) -> object:
    """What is timed: y, or the gradient of every argument for this dy."""
    if direction == "forward":
        with torch.no_grad():
            return function(**arguments)
    return gradients(function(**arguments), arguments, dy)


def rotating_sides(
    call: Call, direction: Direction, functions: dict[str, Function], device: torch.device
) -> Sides:
    """Every call of any side takes the next of several copies of the arguments."""
    copies = num_copies(call.num_bytes, cache_bytes(device))
    arguments = [call.draw(device, seed) for seed in range(copies)]
    with torch.no_grad():
        y = functions[REFERENCE](**arguments[0])
    turn = itertools.cycle([(given, torch.randn_like(y)) for given in arguments])

    def rotating(function: Function) -> Run:
        return lambda: one_pass(direction, function, *next(turn))

    return {name: rotating(function) for name, function in functions.items()}
