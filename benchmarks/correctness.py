"""A side is timed only after its results were compared with the reference's in fp64.

Tolerance, for y and every gradient: the largest error may be twice that of the reference in the
same dtype, plus a floor for where the reference is lucky, plain rounding of the largest value:
one rounding to the result's dtype, and √K roundings of fp32, the standard deviation of a sum of K
terms with independent errors.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import kernels
from benchmarks.calls import Call, in_dtype, storage_shape

Function = Callable[..., Tensor]
Results = dict[str, Tensor]


class Refused(AssertionError):  # noqa: N818 - what happened, not what went wrong
    """Results are wrong, so their time says nothing."""


def check_call(call: Call, sides: Mapping[str, Function], reference: Function, device: Any) -> None:
    """Compare every side's y and gradients at this call. Raises Refused.

    A ConvGRU's ReLU is inside, and among a million values one may be so close to its kink that
    rounding decides; the gradient then jumps, and no error bound holds. So it is drawn anew twice.
    What is wrong is wrong every time.
    """
    last_seed = 3 if call.operator == "conv_gru" else 1
    for seed in range(1, last_seed + 1):
        try:
            _check_drawn(call, sides, reference, device, seed)
            return
        except Refused:
            if seed == last_seed:
                raise


def _check_drawn(
    call: Call, sides: Mapping[str, Function], reference: Function, device: Any, seed: int
) -> None:
    arguments = call.draw(device, seed)
    wide = in_dtype(arguments, torch.float64)
    with torch.no_grad():
        y = reference(**wide)
    generator = torch.Generator(y.device).manual_seed(seed)
    dy = torch.randn(y.shape, generator=generator, device=y.device).to(call.x.dtype)
    dy = _away_from_relu(call, wide, dy)
    truth = results(reference, wide, dy.double())
    usual = results(reference, arguments, dy)
    pixels = call.x.numel() // call.x.shape[2]
    num_terms = max([pixels, *(weight[0].numel() for weight in call.weights.values())])
    for name, function in sides.items():
        check(name, results(function, arguments, dy), usual, truth, num_terms)


def check(side: str, got: Results, usual: Results, truth: Results, num_terms: int) -> None:
    """Errors of `got` against `truth`, beside those of `usual`. Raises Refused, naming the worst.

    `num_terms` is K, the longest sum in any of the results.
    """
    if got.keys() != truth.keys():
        raise Refused(f"{side} returns {sorted(got)}, the reference {sorted(truth)}")
    for name, exact in truth.items():
        largest = exact.abs().max().item()
        rounding = torch.finfo(got[name].dtype).eps / 2
        floor = (rounding + math.sqrt(num_terms) * 2**-24) * largest
        error, expected = (_error(v[name], exact) for v in (got, usual))
        if not error <= 2 * expected + floor:  # NaN is refused too
            raise Refused(
                f"{side}: {name} errs by {error:.3g}, the reference by {expected:.3g}; "
                f"allowed are twice that and {floor:.3g}"
            )


def results(function: Function, arguments: dict[str, Any], dy: Tensor) -> Results:
    """y, and the gradient of every argument that wants one."""
    y = function(**arguments)
    grads = gradients(y, arguments, dy)
    return {"y": y.detach()} | {f"d{name}": grad for name, grad in grads.items()}


def gradients(y: Tensor, arguments: dict[str, Any], dy: Tensor) -> Results:
    """Of every argument that wants one, by name; summed over what is only repeated (stride 0)."""
    inputs = differentiable(arguments)
    grads = torch.autograd.grad(y, list(inputs.values()), dy)
    return {
        name: grad.sum_to_size(storage_shape(leaf))
        for (name, leaf), grad in zip(inputs.items(), grads, strict=True)
    }


def differentiable(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Arguments that want a gradient, also within tuples, by name."""
    found = {}
    for name, value in arguments.items():
        for number, leaf in enumerate(tree_leaves(value)):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                found[f"{name}.{number}" if isinstance(value, tuple) else name] = leaf
    return found


def _error(value: Tensor, exact: Tensor) -> float:
    return (value.double() - exact).abs().max().item()


def _away_from_relu(call: Call, wide: dict[str, Any], dy: Tensor) -> Tensor:
    """dy, but 0 where frame_norm's ReLU is so close to its kink that rounding decides.

    There the gradient jumps by dy, and no error bound holds for either side.
    """
    if call.operator != "frame_norm":
        return dy
    with torch.no_grad():
        # relu(y) - relu(-y) = y.
        turned = wide | {name: -wide[name] for name in ("gain", "bias")}
        positive, negative = (
            kernels.frame_norm(**arguments, impl="reference") for arguments in (wide, turned)
        )
        before_relu = positive - negative
    # Eight roundings of fp32 of the largest value, as in tests/kernels/test_frame_norm_forms.py.
    near = before_relu.abs() < 8 * 2**-24 * before_relu.abs().max()
    return dy.masked_fill(near, 0)
