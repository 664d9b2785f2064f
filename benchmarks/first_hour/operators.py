"""The operators at the shapes of Kinetics' networks: are they right, and fast around 2^31 values?

Beyond that many values in x or y PyTorch may find no fast kernel in cuDNN (pytorch#128936), so what
a sample costs may jump. Whole videos pass that limit first at the last resolution and in the
ConvGRU's gates. Where this project's operators run such convolutions in parts, theirs do not.

Shapes: B batch, T frames, I input and O output channels, H x W pixels.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import product
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.bench_operators import Direction, nothing_to_compare, one_pass, side_functions
from benchmarks.calls import RECORDED, Call, Network, network_calls
from benchmarks.correctness import check_call
from benchmarks.first_hour.parts import Part
from benchmarks.session import OURS, REFERENCE
from benchmarks.setups import Scale
from benchmarks.timing import sample, spread

LIMIT_VALUES = 1 << 31
MOST_SAMPLES = 128
OPERATORS = ("conv_gru", "conv2d", "upsample_conv", "conv_pool2d")
"""Volumes stay below."""
ROUNDS, PATIENCE_SECONDS = 3, 1.5
"""What takes long is timed less often, at least once: it is on a slow path."""


def correctness(scale: Scale, names: tuple[str, ...]) -> Iterator[Part]:
    """Values and gradients of one sample against fp64, in the dtype that is trained in."""
    config, found = scale.kinetics(1), dict[str, Call]()
    cases = product(sorted(set(RECORDED.values())), (1, 2), get_args(Network))
    for operator, stage, network in cases:
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


# ----------------------------------------------------------------------------------- the limit


class Limited(NamedTuple):
    """A convolution that passes the limit, as its network calls it."""

    of: tuple[int, str, Network]  # the stage, the operator and the network, as of `network_calls`
    number: int  # which of these calls
    name: str
    values_per_sample: int  # of the largest tensor

    def sizes(self) -> tuple[int, int, int]:
        """The last below, the first above, and the next power of two."""
        last_below = (LIMIT_VALUES - 1) // self.values_per_sample
        return last_below, last_below + 1, 1 << last_below.bit_length()


def limits(scale: Scale, names: tuple[str, ...]) -> Iterator[Part]:
    """A convolution, a number of samples and a side each; both sides of the limit come first."""
    found = sorted(passing(scale), key=Limited.sizes)
    for position in range(2 if scale.small else 3):
        for limited, side in product(found, ("torch", "kernels")):
            samples = 1 + position if scale.small else limited.sizes()[position]
            name = f"{limited.name}, {samples} samples, {side}"
            yield Part(name, partial(time_per_sample, scale, limited, samples, side))


@cache
def passing(scale: Scale) -> list[Limited]:
    """Every convolution of Kinetics' two stages that passes the limit within `MOST_SAMPLES`.

    Found at the paper's sizes, whatever the scale.
    """
    config = scale._replace(small=False).kinetics(1)
    found = [
        Limited(of, number, f"{call.operator} {call.name}", largest_tensor(call))
        for of in product((1, 2), OPERATORS, get_args(Network))
        for number, call in enumerate(network_calls(config, *of))
    ]
    return [limited for limited in found if limited.sizes()[0] < MOST_SAMPLES]


def largest_tensor(call: Call) -> int:
    """Values of x, of y, or of a ConvGRU's gates before their nonlinearities."""
    if call.operator == "conv_gru":
        return 3 * call.x.numel()
    with torch.no_grad():
        y = call.function()(**call.arguments)
    return max(call.x.numel(), y.numel())


def time_per_sample(scale: Scale, limited: Limited, samples: int, side: str) -> dict[str, Any]:
    """Milliseconds per sample of a forward pass, and of one with its backward pass."""
    call = network_calls(scale.kinetics(samples), *limited.of)[limited.number]
    function, arguments = call.function(), call.draw(scale.device, 0)
    if side == "torch":
        function, arguments = plain_convolution(call, arguments)

    with torch.no_grad():
        dy = torch.randn_like(function(**arguments))
    found: dict[str, Any] = {"values": largest_tensor(call)}
    one_pass("forward_backward", function, arguments, dy)
    for direction in get_args(Direction):
        run = partial(one_pass, direction, function, arguments, dy)
        seconds = sample(run, scale.device, PATIENCE_SECONDS, least=1, most=ROUNDS)
        found[f"{direction}_ms"] = 1e3 * spread(seconds).median / samples
    return found


def plain_convolution(
    call: Call, arguments: dict[str, Any]
) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    """PyTorch's convolution of the call's x, and its `input` and `weight`.

    x are channels-last frames [B*T, I, H, W]; a weight has 3x3 taps, 4x4 if resampling. A ConvGRU's
    gates are one convolution of x, I to 3 I channels.
    """
    frames: Tensor = next(iter(arguments.values())).detach().flatten(0, 1)
    I = frames.shape[1]  # noqa: E741
    O = 3 * I if call.operator == "conv_gru" else list(call.weights.values())[-1].shape[0]  # noqa: E741
    convolve, shape = {
        "conv_pool2d": (partial(F.conv2d, stride=2, padding=1), (O, I, 4, 4)),
        "upsample_conv": (partial(F.conv_transpose2d, stride=2, padding=1), (I, O, 4, 4)),
    }.get(call.operator, (partial(F.conv2d, padding=1), (O, I, 3, 3)))
    weight = torch.randn(shape, device=frames.device).to(frames.dtype)
    last = torch.channels_last
    return convolve, {
        name: tensor.contiguous(memory_format=last).requires_grad_()
        for name, tensor in {"input": frames, "weight": weight}.items()
    }
