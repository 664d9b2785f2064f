"""Convolutions with a norm before and terms after them: values, moments, and what is refused."""

from functools import partial
from typing import Any

import pytest
import torch
from convolution_cases import (
    CASES,
    CUDA,
    DEVICE,
    GIVEN,
    IN,
    LOW,
    NORM,
    OUT,
    POOLINGS,
    SHORTCUT,
    TERMS,
    B,
    H,
    T,
    Tensors,
    W,
    case,
    draw,
    gradients,
    plain,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kernels
from kernels.convolution.fused import convolve
from kernels.convolution.pytorch import Layout


@pytest.mark.parametrize(("kind", "more"), CASES, ids=str)
def test_equals_the_operators_one_by_one(kind: str, more: list[str]) -> None:
    tensors = case(kind, more)
    expected = gradients(partial(plain, kind), tensors)
    for implementation in (None, "reference"):  # by name too, which the norm in front must follow
        got = gradients(partial(run, kind, implementation=implementation), tensors)
        assert expected.keys() == got.keys() == {"y", *tensors}
        for name, value in expected.items():
            scale = value.abs().max().item()
            assert scale > 0.01, name
            torch.testing.assert_close(got[name], value, rtol=0, atol=1e-13 * scale, msg=name)


# Triton's interpreter computes bf16 wrongly; and the upsampling has no choice of these forms,
# pooling none of Triton's.
FORMS = [
    *((form, dtype) for form in ("triton", "epilogue") for dtype in (torch.float32, torch.float16)),
    *(("pytorch", dtype) for dtype in (torch.float32, torch.bfloat16)),
]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    which=st.sampled_from(CASES),
    form=st.sampled_from(FORMS),
    seed=st.integers(0, 1000),
)
def test_as_close_to_the_truth_as_one_by_one(
    which: tuple[str, list[str]], form: tuple[str, torch.dtype], seed: int
) -> None:
    assert_close_to_the_truth(*which, *form, seed)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("implementation", ["triton", "epilogue"])
@pytest.mark.parametrize(("kind", "more"), CASES, ids=str)
def test_bf16_on_a_gpu(kind: str, more: list[str], implementation: str) -> None:
    assert_close_to_the_truth(kind, more, implementation, torch.bfloat16, 0)


def assert_close_to_the_truth(
    kind: str, more: list[str], implementation: str, dtype: torch.dtype, seed: int
) -> None:
    """As one by one, in the same dtype; statistics, gain and shift are fp32, as in models."""
    tensors = case(kind, more, dtype=dtype, seed=seed)
    kept = {k: v.float() for k, v in tensors.items() if k in GIVEN}
    tensors |= kept
    truth = gradients(partial(plain, kind), {k: v.double() for k, v in tensors.items()})
    usual = gradients(partial(plain, kind), tensors)
    form = None if kind == "upsample" else implementation
    if kind in POOLINGS and implementation == "triton":
        form = "epilogue"
    got = gradients(partial(run, kind, implementation=form), tensors)
    for name, exact in truth.items():
        error, plain_error = ((v[name].double() - exact).norm().item() for v in (got, usual))
        # Upsampling's folded kernel is rounded in place of the weight, and sums of four taps.
        floor = 4 * torch.finfo(dtype).eps * exact.norm().item()
        assert error <= 2 * plain_error + floor, name


@pytest.mark.parametrize("implementation", ["triton", "epilogue"])
def test_moments_are_those_of_the_result(implementation: str) -> None:
    tensors = case("separable", NORM, dtype=torch.float32)
    norm = tensors["x"], tensors["gain"], tensors["shift"]
    weights = tensors["weight"], tensors["spatial"], tensors["bias"]
    x = kernels.Normalized(*norm, wants_moments=True)
    y, moments = kernels.separable_conv3d(x, *weights, implementation=implementation)
    assert moments is not None
    for got, expected in zip(moments, kernels.frame_statistics(y), strict=True):
        torch.testing.assert_close(got, expected)
    assert kernels.separable_conv3d(x, *weights, implementation="pytorch").moments is None
    unwanted = kernels.separable_conv3d(
        kernels.Normalized(*norm), *weights, implementation=implementation
    )
    assert torch.equal(unwanted.video, y)
    assert unwanted.moments is None
    kernel = torch.randn(OUT, 4, 4, IN, device=DEVICE)
    y, moments = convolve(
        tensors["x"],
        kernel,
        None,
        Layout((H, W), upsample=True),
        moments=True,
        implementation="epilogue",
    )
    assert moments is not None
    for got, expected in zip(moments, kernels.frame_statistics(y), strict=True):
        torch.testing.assert_close(got, expected)
    with pytest.raises(kernels.ImplementationError, match="no implementation in Triton"):
        convolve(tensors["x"], kernel, None, Layout((H, W), upsample=True), implementation="triton")
    with pytest.raises(kernels.ImplementationError, match="no implementation in Triton"):
        convolve(
            tensors["x"], kernel, None, Layout((H, W), pooling=(1, 2, 2)), implementation="triton"
        )


@pytest.mark.parametrize(
    ("taps", "layout", "implementation"),
    [
        ((3, 3), Layout((H, W)), "triton"),
        ((3, 3), Layout((H, W)), "epilogue"),
        ((3, 3, 3), Layout((H, W), volume=True), "triton"),
        ((4, 4, 4), Layout((H, W), volume=True, pooling=(2, 2, 2)), "epilogue"),
    ],
    ids=str,
)
def test_moments_are_those_of_the_relu(
    taps: tuple[int, ...], layout: Layout, implementation: str
) -> None:
    tensors = draw(["x", "weight", "bias"], taps, torch.float32)
    arguments = tensors["x"], tensors["weight"], tensors["bias"], layout
    y, moments = convolve(*arguments, relu=True, moments=True, implementation=implementation)
    plain_y, _ = convolve(*arguments, implementation=implementation)
    assert torch.equal(y, plain_y.clamp(min=0))
    assert 0.2 < (y == 0).float().mean() < 0.8
    assert moments is not None
    for got, expected in zip(moments, kernels.frame_statistics(y), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("implementation", ["triton", "epilogue", "pytorch", "reference"])
@pytest.mark.parametrize("more", [[], ["residual"]], ids=str)
@pytest.mark.parametrize("kind", ["relu 3x3", "relu 3x3x3"])
def test_nan_passes_a_relu_there_and_back(kind: str, more: list[str], implementation: str) -> None:
    """A run that has gone wrong must not look healthy."""
    tensors = case(kind, more, dtype=torch.float32)
    tensors["x"][1, 2, 3, 1, 4] = torch.nan
    found = gradients(partial(run, kind, implementation=implementation), tensors)
    near = torch.zeros(B, T, OUT, H, W, dtype=torch.bool, device=DEVICE)
    near[1, slice(1, 4) if "3x3x3" in kind else 2, :, :3, 3:] = True
    assert torch.equal(found["y"].isnan(), near)
    assert found["weight"].isnan().any()
    assert found["bias"].isfinite().all()
    if more:  # where y is NaN, the gradient from above goes on as it came
        assert (found["residual"][near] != 0).all()


def test_operators_are_registered_right() -> None:
    tensors = case("conv 3x3", TERMS, dtype=torch.float32)
    x, residual = (
        v.permute(0, 1, 3, 4, 2).flatten(2, 3) for v in (tensors["x"], tensors["residual"])
    )
    x, residual = x.contiguous(), residual.contiguous()
    half = torch.randn(B, T, H * W // 4, OUT, device=DEVICE)
    for added, relu, moments in (
        (residual, False, False),
        (residual, False, True),
        (half, True, True),
    ):
        terms = added, *(tensors[k] for k in LOW)
        convolution = x, tensors["weight"], tensors["bias"], *terms, [H, W], False, relu, moments
        torch.library.opcheck(torch.ops.sswgan.convolution.default, convolution)
        torch.library.opcheck(
            torch.ops.sswgan.add_terms_.default,
            (residual.clone(), tensors["bias"], *terms, [H, W], relu, moments),
        )
    weight = torch.randn(OUT, 3, 3, 3, IN, device=DEVICE)
    torch.library.opcheck(
        torch.ops.sswgan.convolution.default,
        (x, weight, tensors["bias"], *terms, [H, W], False, True, False),
    )


def test_any_layout_gives_the_same_result() -> None:
    tensors = case("conv 3x3", [*NORM, *TERMS])
    expected = gradients(partial(run, "conv 3x3"), tensors)
    turned = {k: v.mT.contiguous().mT if v.dim() == 5 else v for k, v in tensors.items()}
    assert turned["x"].stride() != tensors["x"].stride()
    got = gradients(partial(run, "conv 3x3"), turned)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)


@pytest.mark.parametrize("kind", ["conv 3x3", "conv 1x1", "separable", "upsample"])
def test_moments_given_by_the_maker_of_x_are_used_as_its_own(kind: str) -> None:
    tensors = case(kind, NORM)

    def told(leaves: Tensors) -> Tensor:
        moments = kernels.frame_statistics(leaves["x"].detach())
        x = kernels.Normalized(leaves["x"], leaves["gain"], leaves["shift"], moments=moments)
        if kind == "separable":
            weights = leaves["weight"], leaves["spatial"]
            return kernels.separable_conv3d(x, *weights, leaves["bias"]).video
        if kind == "upsample":
            return kernels.upsample_conv(x, leaves["weight"], leaves["bias"]).video
        return kernels.conv2d(x, leaves["weight"], leaves["bias"]).video

    expected = gradients(partial(plain, kind), tensors)
    for name, value in gradients(told, tensors).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-12)
    # And they are used indeed: wrong ones give another y.
    wrong = kernels.frame_statistics(tensors["x"] + 1)
    x = kernels.Normalized(tensors["x"], tensors["gain"], tensors["shift"], moments=wrong)
    own = kernels.Normalized(tensors["x"], tensors["gain"], tensors["shift"])
    assert (x.value() - own.value()).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "part", "message"),
    [
        ("low", (..., slice(5)), "cannot be injected"),
        ("low", (slice(1),), "x_l is of 1 samples, the features of 2"),
        ("residual", (slice(1),), r"residual must be \(2, 4, 6, 4, 6\), not \(1, 4, 6, 4, 6\)"),
        ("gain", (slice(1),), r"gain must be \[2, 5\]"),
        ("mean", (slice(1),), r"mean must be \[4, 5\]"),
    ],
)
@pytest.mark.parametrize("implementation", [None, "reference"])
def test_what_does_not_fit_is_refused(
    name: str, part: tuple[Any, ...], message: str, implementation: str | None
) -> None:
    tensors = case("conv 3x3", [*GIVEN, *TERMS])
    tensors[name] = tensors[name][part]
    with pytest.raises(ValueError, match=message):
        run("conv 3x3", tensors, implementation)


@pytest.mark.parametrize("implementation", [None, "reference"])
def test_a_shortcut_of_another_size_is_refused(implementation: str | None) -> None:
    tensors = case("conv 3x3", SHORTCUT)
    cases = {"shortcut": tensors | {"shortcut": tensors["shortcut"][..., 1:]}}
    cases["odd"] = tensors | {"x": tensors["x"][..., 1:], "shortcut": tensors["shortcut"][..., 1:]}
    for wrong in cases.values():
        with pytest.raises(ValueError, match=r"the shortcut to \(2, 4, 6, 4, .\) must be of"):
            run("conv 3x3", wrong, implementation)
