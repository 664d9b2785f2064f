"""Every implementation of the frame norm against the reference in fp64, with all its gradients.

On a CPU the Triton kernels run in Triton's interpreter, which computes bf16 wrongly (its stores
truncate): bf16 is for a GPU.
"""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from csrc_forms import CPU_FORMS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kernels

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
FORMS = ("pytorch", "triton") if CUDA else ("pytorch", "triton", *CPU_FORMS)
DTYPES = (torch.float32, torch.float16)
TYPED_FORMS = [
    *((form, dtype) for form in FORMS for dtype in DTYPES),
    *((form, torch.bfloat16) for form in FORMS if CUDA or form != "triton"),
]
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")

# [B, T, C, H, W]; tiles are 2048 values, 64 pixels of 32 channels or 16 of 128.
SIZES = {
    "one value, of variance 0": (1, 1, 1, 1, 1),
    "odd everywhere": (2, 3, 5, 3, 7),
    "one tile exactly": (1, 2, 32, 8, 8),
    "a pixel less than a tile": (1, 2, 32, 7, 9),
    "a pixel more than a tile": (1, 2, 32, 5, 13),
    "a channel more than a block": (2, 1, 33, 4, 4),
    "five channel blocks": (1, 1, 160, 3, 3),
    "three splits of each frame, more frames than merge in one step": (6, 1, 128, 16, 9),
}


@dataclass(frozen=True)
class Case:
    """Arguments of a call, and the upstream gradient."""

    x: Tensor
    gain: Tensor
    bias: Tensor
    statistics: tuple[Tensor, Tensor] | None
    dy: Tensor

    def double(self) -> "Case":
        def up(v: Any) -> Any:
            return tuple(map(up, v)) if isinstance(v, tuple) else v if v is None else v.double()

        names = ("x", "gain", "bias", "statistics", "dy")
        return replace(self, **{name: up(getattr(self, name)) for name in names})


def draw(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    gain_per_frame: bool = False,
    bias_per_frame: bool = False,
    given_statistics: bool = False,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    B, T, C = shape[:3]
    return Case(
        x=(2 * randn(*shape) + 1).to(dtype),
        gain=randn(*((B, T, C) if gain_per_frame else (B, C))),
        bias=randn(*((B, T, C) if bias_per_frame else (B, C))),
        statistics=(randn(T, C), randn(T, C).square() + 0.5) if given_statistics else None,
        dy=randn(*shape).to(dtype),
    )


def run(case: Case, implementation: str) -> dict[str, Tensor]:
    """The output and every input's gradient, by name."""
    inputs = {"x": case.x, "gain": case.gain, "bias": case.bias}
    if case.statistics is not None:
        inputs |= dict(zip(("mean", "var"), case.statistics, strict=True))
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    y = kernels.frame_norm(
        leaves["x"],
        leaves["gain"],
        leaves["bias"],
        statistics=None if case.statistics is None else (leaves["mean"], leaves["var"]),
        implementation=implementation,
    )
    grads = torch.autograd.grad(y, list(leaves.values()), case.dy)
    return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def floors(case: Case, truth: dict[str, Tensor]) -> dict[str, float]:
    """What eight fp32 roundings of the terms that are added up can leave in each result.

    Needed because terms cancel (of one value, dx is 0 = 100 - 100), and the reference may be
    lucky. Sums of n terms leave √n times as much.
    """
    var = kernels.frame_statistics(case.x, implementation="reference")[1]
    var = var if case.statistics is None else case.statistics[1]
    rstd = 1 / (var.min().item() + 1e-4) ** 0.5
    # Largest |x̂| in the making: x and its mean are rounded before they are subtracted.
    normal = 1 + rstd * case.x.abs().max().item()
    gain, dy = (1 + v.abs().max().item() for v in (case.gain, case.dy))
    rounding = 8 * 2**-24
    num_values = (case.x.numel()) ** 0.5
    sums = rounding * num_values * dy * normal
    return {
        "y": rounding * gain * normal,
        "dx": rounding * gain * dy * rstd * normal,
        "dgain": sums,
        "dbias": sums,
        "dmean": sums * gain * rstd,
        "dvar": sums * gain * rstd**2,
    }


def assert_as_good_as_reference(case: Case, implementation: str) -> None:
    """Errors, against fp64, at most twice those of the reference in the same dtype."""
    truth = run(case.double(), "reference")
    reference, got = run(case, "reference"), run(case, implementation)
    allowed = floors(case, truth)
    assert got.keys() == truth.keys()
    for name, exact in truth.items():
        assert got[name].dtype == reference[name].dtype, name
        assert got[name].shape == exact.shape, name
        error, usual = ((v[name].double() - exact).abs().max().item() for v in (got, reference))
        assert error <= 2 * usual + allowed[name], f"{name}: {error} against {usual}"


@pytest.mark.parametrize("shape", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize(("implementation", "dtype"), TYPED_FORMS, ids=str)
def test_sizes(implementation: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_as_good_as_reference(draw(shape, dtype), implementation)


OPTIONS = ("gain_per_frame", "bias_per_frame", "given_statistics")


@pytest.mark.parametrize("options", [{option: True} for option in OPTIONS], ids=str)
@pytest.mark.parametrize(("implementation", "dtype"), TYPED_FORMS, ids=str)
def test_each_option(implementation: str, dtype: torch.dtype, options: dict[str, bool]) -> None:
    assert_as_good_as_reference(draw((2, 3, 5, 3, 4), dtype, **options), implementation)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*(st.integers(1, most) for most in (3, 3, 70, 9, 9))),
    form=st.sampled_from(TYPED_FORMS),
    options=st.fixed_dictionaries(dict.fromkeys(OPTIONS, st.booleans())),
    seed=st.integers(0, 1000),
)
def test_drawn(
    shape: tuple[int, ...], form: tuple[str, torch.dtype], options: dict[str, bool], seed: int
) -> None:
    implementation, dtype = form
    assert_as_good_as_reference(draw(shape, dtype, seed=seed, **options), implementation)


@pytest.mark.parametrize("implementation", FORMS)
def test_statistics(implementation: str) -> None:
    """Values, and the gradient that reaches x from both."""
    x = (100 + torch.randn(3, 2, 5, 6, 7)).to(DEVICE)
    upstream = [torch.randn(2, 5, device=DEVICE) for _ in range(2)]
    results = []
    for v, form in ((x, implementation), (x.double(), "reference")):
        leaf = v.detach().requires_grad_()
        statistics = kernels.frame_statistics(leaf, implementation=form)
        [dx] = torch.autograd.grad(statistics, leaf, [u.to(leaf.dtype) for u in upstream])
        results.append([*statistics, dx])
    # 100 is rounded to 2⁻¹⁸: means and centred values err by that, the variance by twice it.
    for got, exact in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=2**-17, atol=2**-17)


@pytest.mark.parametrize("first", [0.0, 10.0, 1000.0])
@pytest.mark.parametrize("implementation", FORMS)
def test_statistics_of_frames_whose_first_pixel_is_not_typical(
    implementation: str, first: float
) -> None:
    """Zero padding makes corners that are not; sums must not be of what is far from the others.

    Eight roundings of the largest of the values that are added, each as part of their sum.
    """
    x = torch.randn(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x[..., 0, 0] = first
    exact = x.double()
    mean, var = kernels.frame_statistics(x, implementation=implementation)
    std = exact.var((0, 3, 4), correction=0).sqrt()
    rounding = 8 * 2**-24
    assert ((mean - exact.mean((0, 3, 4))) / std).abs().max() <= rounding
    assert (var / std.square() - 1).abs().max() <= rounding


@pytest.mark.parametrize("implementation", FORMS)
def test_any_layout_gives_the_same_bits(implementation: str) -> None:
    """Plain contiguous, channels last, a slice; and an upstream gradient of stride 0."""
    case = draw((2, 3, 6, 4, 5), torch.float32)
    wide = torch.cat([case.x, case.x], dim=-1)
    layouts = {
        "channels last": case.x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3),
        "slice": wide[..., : case.x.shape[-1]],
    }
    constant = torch.ones((), device=DEVICE).expand_as(case.dy)
    expected = run(case, implementation)
    expected_constant = run(replace(case, dy=constant.contiguous()), implementation)
    for x in layouts.values():
        assert x.stride() != case.x.stride()
        for dy, bits in ((case.dy, expected), (constant, expected_constant)):
            got = run(replace(case, x=x, dy=dy), implementation)
            assert all(torch.equal(got[name], bits[name]) for name in bits)


@pytest.mark.parametrize("implementation", FORMS)
def test_runs_are_bit_equal_and_read_nothing_unwritten(implementation: str) -> None:
    """The second run finds NaN in all memory that it allocates."""
    case = draw(SIZES["three splits of each frame, more frames than merge in one step"], DTYPES[0])
    first = run(case, implementation)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        assert case.x.new_empty(3).isnan().all()
        second = run(case, implementation)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("implementation", FORMS)
def test_nan_is_not_hidden_by_the_relu(implementation: str) -> None:
    case = draw((2, 1, 4, 3, 3), torch.float32)
    x = case.x.clone()
    x[0, 0, 1, 2, 2] = torch.nan
    got = run(replace(case, x=x), implementation)
    for name in ("y", "dx"):
        assert got[name][:, :, 1].isnan().all()
        assert got[name][:, :, [0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("implementation", FORMS)
def test_given_statistics_take_no_gradient_from_the_value(
    implementation: str, value: float
) -> None:
    """dx is scale·dy where the ReLU is open, whatever x is."""
    case = draw((2, 1, 4, 3, 3), torch.float32, given_statistics=True)
    place = 0, 0, 1, 2, 2
    opened, x = case.x.clone(), case.x.clone()
    opened[place] = 1e3 * case.gain[0, 1].sign()
    x[place] = value if value != value else value * case.gain[0, 1].sign()
    expected, got = (run(replace(case, x=v), implementation)["dx"] for v in (opened, x))
    if value < 0:
        expected[place] = 0
    else:
        assert expected[place] != 0
    assert torch.equal(got, expected)


def test_an_empty_video() -> None:
    for shape in ((0, 2, 3, 4, 4), (2, 2, 3, 0, 4)):
        x, scale = torch.empty(shape), torch.ones(shape[0], 3)
        fixed = kernels.frame_norm(x, scale, scale, statistics=(torch.ones(2, 3),) * 2)
        assert fixed.shape == x.shape
        with pytest.raises(ValueError, match="empty video"):
            kernels.frame_norm(x, scale, scale)
        with pytest.raises(ValueError, match="empty video"):
            kernels.frame_statistics(x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gain": (2, 3)}, r"gain must be \[2, 5\] or \[2, 3, 5\], not \(2, 3\)"),
        ({"bias": (2, 1, 5)}, "bias must be"),
        ({"x": (2, 5, 4, 4)}, r"x must be \[B, T, C, H, W\]"),
        ({"statistics": (5, 3)}, r"mean must be \[3, 5\]"),
    ],
)
def test_wrong_shapes_are_refused(change: dict[str, tuple[int, ...]], message: str) -> None:
    arguments = {"x": (2, 3, 5, 4, 4), "gain": (2, 5), "bias": (2, 5)} | change
    tensors: dict[str, Any] = {name: torch.ones(shape) for name, shape in arguments.items()}
    if "statistics" in tensors:
        tensors["statistics"] = (tensors["statistics"],) * 2
    with pytest.raises(ValueError, match=message):
        kernels.frame_norm(tensors.pop("x"), tensors.pop("gain"), tensors.pop("bias"), **tensors)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("options", [{}, {"given_statistics": True}], ids=str)
def test_bf16_on_a_gpu(options: dict[str, bool]) -> None:
    for shape in SIZES.values():
        assert_as_good_as_reference(draw(shape, torch.bfloat16, **options), "triton")


@pytest.mark.gpu
@needs_cuda
def test_more_than_2_to_the_31_values() -> None:
    """The last frame lies past int32 offsets; it must be as when it is alone."""
    x = torch.randn(1, 1, 64, 512, 512, device="cuda", dtype=torch.bfloat16)
    x = x.expand(1, 129, -1, -1, -1).clone(memory_format=torch.contiguous_format)
    x = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3).requires_grad_()
    assert x.numel() > 2**31
    gain, bias = torch.randn(2, 1, 64, device="cuda")
    y = kernels.frame_norm(x, gain, bias, implementation="triton")
    [dx] = torch.autograd.grad(y, x, y.detach())
    for result in (y.detach(), dx):
        assert all(torch.equal(result[:, t], result[:, 0]) for t in (64, 128))
        assert result[:, 0].abs().max() > 0
