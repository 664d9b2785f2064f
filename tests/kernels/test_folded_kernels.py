"""Operators that fold a weight, given one that is folded already."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from kernels.convolution.folding import Fold, Folded, fold

Operator = Callable[[Tensor, Any, Tensor], Tensor]
CASES: dict[str, tuple[Operator, Any, tuple[int, ...]]] = {
    f"{name}, {implementation}": (partial(run, implementation=implementation), how, taps)
    for name, run, how, taps in (
        ("upsample", kernels.upsample_conv, "upsampling", (3, 3)),
        ("pool2d", kernels.conv_pool2d, (2, 2), (3, 3)),
        ("pool2d of 1x1", kernels.conv_pool2d, (2, 2), (1, 1)),
        ("pool3d", kernels.conv_pool3d, (1, 2, 2), (3, 3, 3)),
        ("pool3d, time too", partial(kernels.conv_pool3d, pooling=(2, 2, 2)), (2, 2, 2), (3, 3, 3)),
    )
    for implementation in ("folded", "reference")
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("size", [(4, 6), (5, 7)], ids=str)  # odd: some pixels have no partner
def test_the_same_as_of_the_weight(
    case: tuple[Operator, Any, tuple[int, ...]], size: tuple[int, int]
) -> None:
    """y and the gradients of x, weight and bias, in fp64 up to rounding."""
    run, how, taps = case
    random = torch.Generator().manual_seed(0)
    shapes = (2, 4, 5, *size), (7, *taps, 5), (7,)
    leaves = [
        torch.randn(s, generator=random, dtype=torch.float64, requires_grad=True) for s in shapes
    ]
    x, weight, bias = leaves
    found = []
    for given in (weight, Folded(fold(weight, how), how)):
        y = run(x, given, bias)
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
        found.append([y, *torch.autograd.grad(y, leaves, upstream)])
    for expected, got in zip(*found, strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12 * scale)


@pytest.mark.parametrize(
    ("how", "asked"),
    [((1, 2, 2), (2, 2, 2)), ((2, 2, 2), (1, 2, 2))],
    ids=str,
)
def test_a_kernel_folded_for_another_resampling_is_refused(
    how: Fold, asked: kernels.Pooling
) -> None:
    weight = torch.randn(7, 3, 3, 3, 5)
    with pytest.raises(ValueError, match=r"was folded into is not one of \(., 2, 2\)"):
        kernels.conv_pool3d(
            torch.randn(2, 4, 5, 4, 6), Folded(fold(weight, how), how), pooling=asked
        )


def test_weights_of_other_axes_or_taps_are_refused() -> None:
    x, flat, deep = torch.randn(2, 4, 5, 4, 6), torch.randn(7, 3, 3, 5), torch.randn(7, 3, 3, 3, 5)
    cases: list[tuple[Operator, Any, str]] = [
        (kernels.conv_pool2d, deep, r"must be \[O, kh, kw, I\], not \[7, 3, 3, 3, 5\]"),
        (kernels.conv_pool3d, flat, r"must be \[O, kt, kh, kw, I\], not \[7, 3, 3, 5\]"),
        (kernels.conv_pool2d, Folded(fold(deep, (1, 2, 2)), (1, 2, 2)), "must be"),
        (kernels.conv_pool2d, Folded(fold(flat, "upsampling"), "upsampling"), "is not one of"),
        (kernels.upsample_conv, Folded(flat, "upsampling"), r"not \[7, 3, 3, 5\]"),
        (kernels.upsample_conv, Folded(fold(flat, (2, 2)), (2, 2)), "is not one of upsampling"),
    ]
    for operator, weight, message in cases:
        with pytest.raises(ValueError, match=message):
            operator(x, weight, torch.zeros(7))
