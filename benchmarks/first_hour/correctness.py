"""Every operator at every shape of Kinetics' networks, against its reference in fp64."""

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import get_args

from benchmarks.bench_operators import nothing_to_compare, side_functions
from benchmarks.calls import RECORDED, Call, Network, network_calls
from benchmarks.correctness import check_call
from benchmarks.first_hour.parts import Part
from benchmarks.first_hour.scale import Scale
from benchmarks.session import OURS, REFERENCE


def correctness(scale: Scale, names: tuple[str, ...]) -> Iterator[Part]:
    """Values and gradients of one sample, in the dtype that is trained in."""
    config, found = scale.kinetics(1), dict[str, Call]()
    for case in product(sorted(set(RECORDED.values())), (1, 2), get_args(Network)):
        operator, stage, network = case
        for call in network_calls(config, stage, operator, network):
            found.setdefault(f"{operator} {call.name}", call)
    for name, call in found.items():
        yield Part(name, partial(check, scale, call))


def check(scale: Scale, call: Call) -> str:
    """Raises Refused where it errs by more than twice what the same-dtype reference does."""
    functions = side_functions(call.operator, compiled=False, plain=False)
    check_call(call, {OURS: functions[OURS]}, functions[REFERENCE], scale.device)
    same = nothing_to_compare(call.operator, scale.device, call.x.dtype)
    return f"runs its reference: {same}" if same else "within the bounds of rounding"
