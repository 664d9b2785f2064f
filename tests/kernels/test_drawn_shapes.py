"""Convolutions of drawn shapes, 1 and odd among them, against the reference in fp64.

Values are small whole numbers, all sums of which fp32 holds exactly, those divided by the 4 or 8
pixels of a pool as well: whatever it adds first, a form must give the reference's very numbers, and
no wrong pixel can hide in a tolerance.
"""

from functools import partial

import pytest
import torch
from convolution_cases import (
    KINDS,
    POOLINGS,
    Size,
    case,
    choices_of_terms,
    gradients,
    in_whole_numbers,
    plain,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st


@st.composite
def sizes_and_terms(draw: st.DrawFn, kind: str) -> tuple[Size, list[str]]:
    """A size that the operator allows, and the names of what it adds."""
    few, names = st.integers(1, 4), draw(st.sampled_from(choices_of_terms(kind)))
    T, H, W = (draw(st.integers(least, 5)) for least in POOLINGS.get(kind, (1, 1, 1)))
    if "shortcut" in names:  # which is of half the height and width
        H, W = 2 * H, 2 * W
    size = Size(draw(few), T, draw(few), draw(few), H, W)
    if "low" in names:
        step = draw(st.integers(1, 2))
        size = size._replace(T=step * T, low=(step, draw(few), draw(few)))
    return size, names


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.float64]), bias=st.booleans())
def test_every_number_is_the_references(
    kind: str, data: st.DataObject, dtype: torch.dtype, bias: bool
) -> None:
    assert_the_references(kind, "pytorch", *data.draw(sizes_and_terms(kind)), bias, dtype)


# Fewer, over all: the interpreter takes a second for some. Kernels alone have more in
# test_convolution_triton.py.
@pytest.mark.parametrize("form", ["epilogue", "triton"])
@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data(), bias=st.booleans())
def test_every_number_of_triton_is_the_references(
    form: str, data: st.DataObject, bias: bool
) -> None:
    without = ["upsample", *(POOLINGS if form == "triton" else [])]
    kind = data.draw(st.sampled_from([kind for kind in KINDS if kind not in without]))
    assert_the_references(kind, form, *data.draw(sizes_and_terms(kind)), bias, torch.float32)


def assert_the_references(
    kind: str, form: str, size: Size, names: list[str], bias: bool, dtype: torch.dtype
) -> None:
    tensors = {k: in_whole_numbers(v) for k, v in case(kind, names, size=size).items()}
    if not bias:
        del tensors["bias"]
    # On a GPU cuDNN might go by way of fractions, as Winograd's algorithm does.
    with torch.backends.cudnn.flags(enabled=False):
        truth = gradients(partial(plain, kind), tensors, whole=True)
        operands = {name: value.to(dtype) for name, value in tensors.items()}
        for implementation in ("folded",) if kind == "upsample" else (form,):
            got = gradients(partial(run, kind, implementation=implementation), operands, whole=True)
            for name, exact in truth.items():
                assert got[name].dtype == dtype
                assert torch.equal(got[name].double(), exact), name
