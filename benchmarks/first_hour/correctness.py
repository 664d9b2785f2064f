"""Every operator at every shape of Kinetics' networks, against its reference in fp64."""

from collections.abc import Iterator
from functools import partial
from typing import get_args

from benchmarks.calls import RECORDED, Call, Network, network_calls
from benchmarks.correctness import check_call
from benchmarks.first_hour.parts import Part
from benchmarks.first_hour.scale import Scale
from benchmarks.operators import OURS, REFERENCE, nothing_to_compare, side_functions


def parts(scale: Scale, names: tuple[str, ...]) -> Iterator[Part]:
    """Values and gradients of one sample, in the dtype that is trained in."""
    config = scale.kinetics(1)
    seen = set()
    for operator in sorted(set(RECORDED.values())):
        for stage in (1, 2):
            for network in get_args(Network):
                for call in network_calls(config, stage, operator, network):
                    if (operator, call.name) not in seen:
                        seen.add((operator, call.name))
                        yield Part(f"{operator} {call.name}", partial(check, scale, call))


def check(scale: Scale, call: Call) -> str:
    """Raises Refused where it errs by more than twice what the same-dtype reference does."""
    functions = side_functions(call.operator, compiled=False, plain=False)
    check_call(call, {OURS: functions[OURS]}, functions[REFERENCE], scale.device)
    same = nothing_to_compare(call.operator, scale.device, call.x.dtype)
    return f"runs its reference: {same}" if same else "within the bounds of rounding"
