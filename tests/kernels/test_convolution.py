"""Convolutions with a norm before and terms after them: values, gradients, and what they keep."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import kernels
from kernels.conv_pool import conv_pool2d_folded, conv_pool3d_folded
from kernels.convolution import convolve
from kernels.convolution_pytorch import Layout

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
B, T, H, W = 2, 4, 4, 6
IN, OUT = 5, 6
Tensors = dict[str, Tensor]


def draw(
    names: list[str],
    taps: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    pooling: tuple[int, int, int] = (1, 1, 1),
) -> Tensors:
    """Everything that `names` asks for besides x, the weights and the bias."""
    random = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "x": (B, T, IN, H, W),
        "weight": (OUT, *taps, IN),
        "spatial": (OUT, 3, 3, OUT),
        "bias": (OUT,),
        "gain": (B, IN),
        "shift": (B, IN),
        "mean": (T, IN),
        "var": (T, IN),
        "residual": (B, T // pooling[0], OUT, H // pooling[1], W // pooling[2]),
        "shortcut": (B, T, IN, H // 2, W // 2),
        "projection": (OUT, 1, 1, IN),
        "projection_bias": (OUT,),
        "low": (B, T // 2, 3, 2 * H, W),
        "low_weight": (OUT, 1, 1, 3),
        "low_bias": (OUT,),
    }
    drawn = {k: torch.randn(shapes[k], generator=random, dtype=torch.float64) for k in names}
    if "var" in drawn:
        drawn["var"] = drawn["var"].square() + 0.5
    return {name: value.to(DEVICE, dtype) for name, value in drawn.items()}


def run(kind: str, tensors: Tensors, impl: str | None = None) -> Tensor:
    """The operator `kind` on whatever of its inputs are there."""
    x: Any = tensors["x"]
    if "gain" in tensors:
        statistics = (tensors["mean"], tensors["var"]) if "mean" in tensors else None
        x = kernels.Normalized(x, tensors["gain"], tensors["shift"], statistics)
    if kind == "upsample":
        return kernels.upsample_conv(x, tensors["weight"], tensors["bias"], impl=impl)
    if kind in POOLINGS:
        return pooled(kind, tensors, impl)
    skip = None
    if "low" in tensors:
        skip = kernels.LowSkip(*(tensors[k] for k in ("low", "low_weight", "low_bias")))
    residual: Any = tensors.get("residual")
    if "shortcut" in tensors:
        residual = kernels.UpsampledShortcut(*(tensors[k] for k in SHORTCUT))
    terms: dict[str, Any] = {"residual_BTOHW": residual, "skip": skip}
    if kind == "separable":
        weights = tensors["weight"], tensors["spatial"]
        return kernels.separable_conv3d(x, *weights, tensors["bias"], **terms, impl=impl)
    terms |= {"relu": "relu" in kind, "impl": impl}
    if "3x3x3" in kind:
        del terms["skip"]
        return kernels.conv3d(x, tensors["weight"], tensors["bias"], **terms)
    return kernels.conv2d(x, tensors["weight"], tensors["bias"], **terms)


def pooled(kind: str, tensors: Tensors, impl: str | None) -> Tensor:
    """By the public function, or by the form of the convolution that is named."""
    operands = tensors["x"], tensors["weight"], tensors["bias"]
    terms: dict[str, Any] = {"residual_BTOHW": tensors.get("residual"), "impl": impl}
    public = impl in (None, "reference")
    if kind == "pool 2d":
        return (kernels.conv_pool2d if public else conv_pool2d_folded)(*operands, **terms)
    run_3d = kernels.conv_pool3d if public else conv_pool3d_folded
    return run_3d(*operands, pooling=POOLINGS[kind], **terms)


NORM, GIVEN = ["gain", "shift"], ["gain", "shift", "mean", "var"]
LOW = ["low", "low_weight", "low_bias"]
TERMS = ["residual", *LOW]
SHORTCUT = ["shortcut", "projection", "projection_bias"]
POOLINGS: dict[str, kernels.Pooling] = {
    "pool 2d": (1, 2, 2),
    "pool 3d": (1, 2, 2),
    "pool 3d, time too": (2, 2, 2),
}
KINDS = {
    "conv 3x3": (3, 3),
    "conv 1x1": (1, 1),
    "separable": (3,),
    "upsample": (3, 3),
    "relu 3x3": (3, 3),
    "conv 3x3x3": (3, 3, 3),
    "relu 3x3x3": (3, 3, 3),
    **{kind: (3, 3) if kind == "pool 2d" else (3, 3, 3) for kind in POOLINGS},
}


def terms_of(kind: str) -> list[str]:
    """All that the operator may add."""
    if kind == "upsample":
        return []
    return ["residual"] if "3x3x3" in kind or kind in POOLINGS else TERMS


def choices_of_terms(kind: str) -> list[list[str]]:
    """Nothing, all, and in place of a residual a shortcut."""
    shortcuts = [SHORTCUT, [*SHORTCUT, *LOW]] if kind in ("conv 3x3", "relu 3x3") else []
    return [[], *([terms_of(kind)] if terms_of(kind) else []), *shortcuts]


CASES = [
    (kind, [*norm, *terms])
    for kind in KINDS
    for norm in ([[]] if kind in POOLINGS else ([], NORM, GIVEN))
    for terms in choices_of_terms(kind)
]


def case(kind: str, more: list[str], **options: Any) -> Tensors:
    spatial = ["spatial"] if kind == "separable" else []
    options["pooling"] = POOLINGS.get(kind, (1, 1, 1))
    return draw(["x", "weight", *spatial, "bias", *more], KINDS[kind], **options)


def gradients(function: Callable[[Tensors], Tensor], tensors: Tensors) -> Tensors:
    """y, and the gradient of everything from a random upstream."""
    leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}
    y = function(leaves)
    upstream = torch.randn(
        y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).to(y)
    grads = torch.autograd.grad(y, list(leaves.values()), upstream)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def plain(kind: str, tensors: Tensors) -> Tensor:
    """Operator by operator, through autograd."""
    with kernels.use("reference"):
        return run(kind, tensors)


@pytest.mark.parametrize(("kind", "more"), CASES, ids=str)
def test_equals_the_operators_one_by_one(kind: str, more: list[str]) -> None:
    tensors = case(kind, more)
    expected = gradients(partial(plain, kind), tensors)
    for impl in (None, "reference"):  # by name too, which the norm in front must follow
        got = gradients(partial(run, kind, impl=impl), tensors)
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
@pytest.mark.parametrize("impl", ["triton", "epilogue"])
@pytest.mark.parametrize(("kind", "more"), CASES, ids=str)
def test_bf16_on_a_gpu(kind: str, more: list[str], impl: str) -> None:
    assert_close_to_the_truth(kind, more, impl, torch.bfloat16, 0)


def assert_close_to_the_truth(
    kind: str, more: list[str], impl: str, dtype: torch.dtype, seed: int
) -> None:
    """As one by one, in the same dtype; statistics, gain and shift are fp32, as in models."""
    tensors = case(kind, more, dtype=dtype, seed=seed)
    kept = {k: v.float() for k, v in tensors.items() if k in GIVEN}
    tensors |= kept
    truth = gradients(partial(plain, kind), {k: v.double() for k, v in tensors.items()})
    usual = gradients(partial(plain, kind), tensors)
    form = None if kind == "upsample" else impl
    if kind in POOLINGS and impl == "triton":
        form = "epilogue"
    got = gradients(partial(run, kind, impl=form), tensors)
    for name, exact in truth.items():
        error, plain_error = ((v[name].double() - exact).norm().item() for v in (got, usual))
        # Upsampling's folded kernel is rounded in place of the weight, and sums of four taps.
        floor = 4 * torch.finfo(dtype).eps * exact.norm().item()
        assert error <= 2 * plain_error + floor, name


@pytest.mark.parametrize("impl", ["triton", "epilogue"])
def test_moments_are_those_of_the_result(impl: str) -> None:
    tensors = case("separable", [], dtype=torch.float32)
    weights = tensors["weight"], tensors["spatial"], tensors["bias"]
    y, moments = kernels.separable_conv3d_with_moments(tensors["x"], *weights, impl=impl)
    assert torch.equal(y, kernels.separable_conv3d(tensors["x"], *weights, impl=impl))
    assert moments is not None
    for got, expected in zip(moments, kernels.frame_statistics(y), strict=True):
        torch.testing.assert_close(got, expected)
    assert kernels.separable_conv3d_with_moments(tensors["x"], *weights, impl="pytorch")[1] is None
    kernel = torch.randn(OUT, 4, 4, IN, device=DEVICE)
    y, moments = convolve(
        tensors["x"], kernel, None, Layout((H, W), upsample=True), moments=True, impl="epilogue"
    )
    assert moments is not None
    for got, expected in zip(moments, kernels.frame_statistics(y), strict=True):
        torch.testing.assert_close(got, expected)
    with pytest.raises(kernels.ImplementationError, match="no form in Triton"):
        convolve(tensors["x"], kernel, None, Layout((H, W), upsample=True), impl="triton")
    with pytest.raises(kernels.ImplementationError, match="no form in Triton"):
        convolve(tensors["x"], kernel, None, Layout((H, W), pooling=(1, 2, 2)), impl="triton")


@pytest.mark.parametrize(
    ("taps", "layout", "impl"),
    [
        ((3, 3), Layout((H, W)), "triton"),
        ((3, 3), Layout((H, W)), "epilogue"),
        ((3, 3, 3), Layout((H, W), volume=True), "triton"),
        ((4, 4, 4), Layout((H, W), volume=True, pooling=(2, 2, 2)), "epilogue"),
    ],
    ids=str,
)
def test_moments_are_those_of_the_relu(taps: tuple[int, ...], layout: Layout, impl: str) -> None:
    tensors = draw(["x", "weight", "bias"], taps, torch.float32)
    arguments = tensors["x"], tensors["weight"], tensors["bias"], layout
    y, moments = convolve(*arguments, relu=True, moments=True, impl=impl)
    plain_y, _ = convolve(*arguments, impl=impl)
    assert torch.equal(y, plain_y.clamp(min=0))
    assert 0.2 < (y == 0).float().mean() < 0.8
    assert moments is not None
    for got, expected in zip(moments, kernels.frame_statistics(y), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("impl", ["triton", "epilogue", "pytorch", "reference"])
@pytest.mark.parametrize("more", [[], ["residual"]], ids=str)
@pytest.mark.parametrize("kind", ["relu 3x3", "relu 3x3x3"])
def test_nan_passes_a_relu_there_and_back(kind: str, more: list[str], impl: str) -> None:
    """A run that has gone wrong must not look healthy."""
    tensors = case(kind, more, dtype=torch.float32)
    tensors["x"][1, 2, 3, 1, 4] = torch.nan
    found = gradients(partial(run, kind, impl=impl), tensors)
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
            return kernels.separable_conv3d(x, leaves["weight"], leaves["spatial"], leaves["bias"])
        op = kernels.upsample_conv if kind == "upsample" else kernels.conv2d
        return op(x, leaves["weight"], leaves["bias"])

    expected = gradients(partial(plain, kind), tensors)
    for name, value in gradients(told, tensors).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-12)
    # And they are used indeed: wrong ones give another y.
    wrong = kernels.frame_statistics(tensors["x"] + 1)
    x = kernels.Normalized(tensors["x"], tensors["gain"], tensors["shift"], moments=wrong)
    own = kernels.Normalized(tensors["x"], tensors["gain"], tensors["shift"])
    assert (x.value() - own.value()).abs().max() > 0.1


@pytest.mark.parametrize(("kind", "more"), CASES, ids=str)
def test_second_derivatives(kind: str, more: list[str]) -> None:
    """Those of a nonlinear function of all gradients, against the composition's."""
    tensors = case(kind, more)
    seconds = []
    for function in (run, plain):
        leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}
        y = function(kind, leaves)
        grads = torch.autograd.grad(y.square().sum(), list(leaves.values()), create_graph=True)
        total = torch.stack([g.square().sum() for g in grads]).sum()
        seconds.append(torch.autograd.grad(total, list(leaves.values())))
    for name, got, expected in zip(tensors, *seconds, strict=True):
        scale = expected.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12 * scale, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    tensors = case(kind, [*([] if kind in POOLINGS else NORM), *terms_of(kind)])
    tensors["x"] = tensors["x"][:, :2, :, :2, :2]
    if "residual" in tensors:
        frames, rows, columns = (2 // size for size in POOLINGS.get(kind, (1, 1, 1)))
        tensors["residual"] = tensors["residual"][:, :frames, :, :rows, :columns]
    if "low" in tensors:
        tensors["low"] = tensors["low"][:, :1, :, :4, :2]

    def function(*values: Tensor) -> Tensor:
        return run(kind, dict(zip(tensors, values, strict=True)))

    assert torch.autograd.gradcheck(
        function, [v.detach().requires_grad_() for v in tensors.values()]
    )


@pytest.mark.parametrize(
    ("kind", "more", "impl"),
    [
        ("conv 3x3", GIVEN, None),
        ("conv 3x3", ["residual"], "pytorch"),
        ("conv 3x3", [], "epilogue"),
        ("conv 3x3", [*NORM, *SHORTCUT], "pytorch"),
        ("conv 3x3", [*NORM, *SHORTCUT, *LOW], "epilogue"),
        ("separable", [*NORM, *TERMS], "pytorch"),
        ("separable", [*NORM, *TERMS], "epilogue"),
        ("separable", [*NORM, *TERMS], "triton"),
        ("upsample", NORM, None),
        ("relu 3x3", [], None),
        ("relu 3x3", [], "epilogue"),
        ("relu 3x3", [*NORM, *TERMS], "pytorch"),
        ("relu 3x3", [*NORM, *TERMS], "epilogue"),
        ("relu 3x3", [*NORM, *TERMS], "triton"),
        ("relu 3x3x3", [], None),
        ("relu 3x3x3", ["residual"], "pytorch"),
        ("relu 3x3x3", ["residual"], "epilogue"),
        ("pool 2d", ["residual"], "epilogue"),
        ("pool 3d, time too", ["residual"], None),
    ],
    ids=str,
)
def test_compiled_and_checkpointed_equal_eager(
    kind: str, more: list[str], impl: str | None
) -> None:
    tensors = case(kind, more, dtype=torch.float32)
    function = partial(run, kind, impl=impl)
    torch.compiler.reset()  # every case is a program of its own
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")

    def rerun(leaves: Tensors) -> Tensor:
        y: Tensor = checkpoint(function, leaves, use_reentrant=False)
        return y

    expected = gradients(function, tensors)
    for other in (compiled, rerun):
        got = gradients(other, tensors)
        # PyTorch's own convolution sums its bias's gradient in another order when compiled.
        rounding = {"projection_bias": 1e-6 * expected["y"].numel() ** 0.5}
        for name, value in expected.items():
            atol = rounding.get(name, 0.0)
            torch.testing.assert_close(got[name], value, rtol=0, atol=atol, msg=name)


def test_two_runs_are_bit_equal_and_read_nothing_unwritten() -> None:
    """The second finds NaN in all memory that it allocates."""
    tensors = case("separable", [*NORM, *TERMS], dtype=torch.float32)
    first = gradients(partial(run, "separable"), tensors)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        second = gradients(partial(run, "separable"), tensors)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(second[name], value) for name, value in first.items())


@dataclass(frozen=True)
class Kept:
    """Bytes of distinct storages."""

    x: int
    rest: int


def kept(kind: str, tensors: Tensors, then: Callable[[Tensor], object] = lambda y: y) -> Kept:
    """What a call keeps for its backward pass, besides weights, and what is made of its result."""
    storages: dict[int, int] = {}
    alive = []

    def pack(v: Tensor) -> Tensor:
        storages[v.untyped_storage()._cdata] = v.untyped_storage().nbytes()
        alive.append(v)  # so that no storage takes another's place
        return v

    leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}
    with saved_tensors_hooks(pack, lambda v: v):
        then(run(kind, leaves))
    own = {leaves[k].untyped_storage()._cdata for k in ("weight", "spatial") if k in leaves}
    x = storages.pop(leaves["x"].untyped_storage()._cdata, 0)
    return Kept(x, sum(size for key, size in storages.items() if key not in own))


@pytest.mark.parametrize(
    ("kind", "videos"), [("conv 3x3", 0), ("conv 1x1", 0), ("upsample", 0), ("separable", 1)]
)
def test_a_convolution_after_a_norm_keeps_x_alone(kind: str, videos: int) -> None:
    """The separable one keeps what lies between its halves too; the residual is not kept."""
    more = NORM if kind == "upsample" else [*NORM, *TERMS]
    tensors = case(kind, more, dtype=torch.float32)
    # Channels last, as videos are here: else x would be copied.
    tensors["x"] = tensors["x"].permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    got = kept(kind, tensors)
    assert got.x == tensors["x"].nbytes
    small = 2 * T * IN * 4 + 2 * B * IN * 4 + tensors["weight"].nbytes * 2
    small += sum(tensors[k].nbytes for k in ("low", "low_weight") if k in tensors)
    assert got.rest - videos * B * T * OUT * H * W * 4 <= small
    with kernels.use("reference"):
        assert kept(kind, tensors).rest > got.rest + tensors["x"].nbytes


@pytest.mark.parametrize("more", [[], ["residual"]], ids=str)
@pytest.mark.parametrize("kind", ["relu 3x3", "relu 3x3x3"])
@pytest.mark.parametrize("form", ["epilogue", "pytorch"])
def test_a_relu_keeps_what_comes_next_keeps(
    kind: str, more: list[str], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x, y, and no third video."""
    monkeypatch.setitem(globals(), "run", partial(run, impl=form))
    tensors = case(kind, more, dtype=torch.float32)
    tensors["x"] = tensors["x"].permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    weight = torch.randn(OUT, 3, 3, OUT, device=DEVICE)
    got = kept(kind, tensors, lambda y: kernels.conv2d(y, weight.requires_grad_(), impl=form))
    assert got == Kept(tensors["x"].nbytes, B * T * OUT * H * W * 4 + weight.nbytes)


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
@pytest.mark.parametrize("impl", [None, "reference"])
def test_what_does_not_fit_is_refused(
    name: str, part: tuple[Any, ...], message: str, impl: str | None
) -> None:
    tensors = case("conv 3x3", [*GIVEN, *TERMS])
    tensors[name] = tensors[name][part]
    with pytest.raises(ValueError, match=message):
        run("conv 3x3", tensors, impl)


@pytest.mark.parametrize("kind", ["conv 3x3", "relu 3x3"])
def test_a_residual_alone_may_want_a_gradient(kind: str) -> None:
    tensors = case(kind, [*NORM, *TERMS])
    residual = tensors["residual"].requires_grad_()
    y = run(kind, tensors)
    for graph in (False, True):
        [dresidual] = torch.autograd.grad(y.square().sum(), residual, create_graph=graph)
        torch.testing.assert_close(dresidual, 2 * y)
        y = run(kind, tensors)
    tensors = case(kind, [*NORM, *SHORTCUT])
    bias = tensors["projection_bias"].requires_grad_()
    y = run(kind, tensors)
    [dbias] = torch.autograd.grad(y.square().sum(), bias)
    torch.testing.assert_close(dbias, 2 * y.sum((0, 1, 3, 4)))


@pytest.mark.parametrize("impl", [None, "reference"])
def test_a_shortcut_of_another_size_is_refused(impl: str | None) -> None:
    tensors = case("conv 3x3", SHORTCUT)
    cases = {"shortcut": tensors | {"shortcut": tensors["shortcut"][..., 1:]}}
    cases["odd"] = tensors | {"x": tensors["x"][..., 1:], "shortcut": tensors["shortcut"][..., 1:]}
    for wrong in cases.values():
        with pytest.raises(ValueError, match=r"the shortcut to \(2, 4, 6, 4, .\) must be of"):
            run("conv 3x3", wrong, impl)


@pytest.mark.parametrize("impl", ["pytorch", "epilogue"])
@pytest.mark.parametrize("more", [[*NORM, *TERMS], [*NORM, *SHORTCUT, *LOW]], ids=str)
def test_a_graph_alone_has_the_same_gradients_and_costs_nothing(more: list[str], impl: str) -> None:
    """But for the shortcut's projection, where that is PyTorch's own convolution."""
    tensors = case("conv 3x3", more, dtype=torch.float32)

    def function(leaves: Tensors, only_graph: bool) -> Tensor:
        x = kernels.Normalized(leaves["x"], leaves["gain"], leaves["shift"])
        residual: Any = leaves.get("residual")
        if "shortcut" in leaves:
            residual = kernels.UpsampledShortcut(*(leaves[k] for k in SHORTCUT))
        y, _ = kernels.conv2d_with_moments(
            x,
            leaves["weight"],
            leaves["bias"],
            residual_BTOHW=residual,
            skip=kernels.LowSkip(*(leaves[k] for k in LOW)),
            only_graph=only_graph,
            impl=impl,
        )
        return y

    expected = gradients(partial(function, only_graph=False), tensors)
    got = gradients(partial(function, only_graph=True), tensors)
    assert got.pop("y").shape == expected.pop("y").shape
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
    leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}
    with FlopCounterMode(display=False) as counter:
        function(leaves, only_graph=True)
    projection = 2 * B * T * H * W // 4 * IN * OUT
    its_own = projection if "shortcut" in more and impl == "pytorch" else 0
    assert counter.get_total_flops() == its_own
