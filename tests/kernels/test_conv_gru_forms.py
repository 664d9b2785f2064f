"""Every implementation of the ConvGRU against the reference in fp64, with all its gradients.

On a CPU the Triton kernels run in Triton's interpreter, which computes bf16 wrongly (its stores
truncate): bf16 is for a GPU.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from large_gpu import needs_gpu_memory
from torch import Tensor

import kernels
from kernels.conv_gru.gates import passes

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
FORMS = ("pytorch", "triton")
DTYPES = (torch.float32, torch.float16)
NAMES = ("x", "weight_r", "weight_u", "weight_c", "bias_r", "bias_u", "bias_c")
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")

# [B, T, C, H, W]; tiles are 1024 values, 32 pixels of 32 channels or 8 of 128.
SIZES = {
    "one value, no recurrence": (1, 1, 1, 1, 1),
    "one value, many frames": (1, 7, 1, 1, 1),
    "odd everywhere": (2, 3, 5, 3, 7),
    "one tile exactly": (1, 2, 32, 4, 8),
    "a pixel less than a tile": (1, 2, 32, 1, 31),
    "a pixel more than a tile": (2, 2, 32, 3, 11),
    "a channel more than half a block": (2, 2, 33, 4, 4),
    "two channels more than a block": (1, 2, 130, 3, 3),
}


@dataclass(frozen=True)
class Case:
    """Arguments of a call, x as it is before a constant one is expanded, and dy."""

    tensors: tuple[Tensor, ...]
    num_frames: int
    dy: Tensor

    def double(self) -> "Case":
        tensors = tuple(v.double() for v in self.tensors)
        return replace(self, tensors=tensors, dy=self.dy.double())


def draw(
    shape: tuple[int, ...], dtype: torch.dtype, *, constant: bool = False, seed: int = 0
) -> Case:
    """No value before the relu is near 0, where its rounding would decide about the gradient."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    B, T, C, H, W = shape
    # Of 18 C products of a weight and a value of about 1: 0.3 before the nonlinearities.
    weights = [0.3 * randn(C, 3, 3, 2 * C) / (18 * C) ** 0.5 for _ in range(3)]
    bias_c = randn(C).sign() * (3 + randn(C).abs())
    tensors = randn(B, 1 if constant else T, C, H, W), *weights, randn(C), randn(C), bias_c
    return Case(tuple(v.to(DEVICE, dtype) for v in tensors), T, randn(*shape).to(DEVICE, dtype))


def run(case: Case, implementation: str) -> dict[str, Tensor]:
    """The output and every input's gradient, by name."""
    leaves = [v.detach().requires_grad_() for v in case.tensors]
    x = leaves[0].expand(-1, case.num_frames, -1, -1, -1)
    y = kernels.conv_gru(x, *leaves[1:], implementation=implementation)
    grads = torch.autograd.grad(y, leaves, case.dy)
    return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(NAMES, grads, strict=True)}


def floors(case: Case, truth: dict[str, Tensor]) -> dict[str, float]:
    """What rounding r, u, c and h once each, in the dtype of x, can leave in each result.

    Needed because the reference may be lucky. Sums over n pixels and frames leave √n times as much.
    """
    rounding = 4 * torch.finfo(case.dy.dtype).eps / 2
    num_terms = case.dy[:, :, 0].numel() ** 0.5
    value = 1 + max(v.abs().max().item() for v in (case.tensors[0], truth["y"]))
    slope = 1 + case.dy.abs().max().item()
    sums = rounding * slope * num_terms
    found = {"y": rounding * value, "dx": rounding * slope}
    if case.num_frames > case.tensors[0].shape[1]:
        found["dx"] *= case.num_frames**0.5
    return found | {f"d{n}": sums * (value if "weight" in n else 1.0) for n in NAMES[1:]}


def assert_as_good_as_reference(case: Case, implementation: str) -> None:
    """Errors, against fp64, at most twice those of the reference in the same dtype."""
    truth = run(case.double(), "reference")
    reference, got = run(case, "reference"), run(case, implementation)
    allowed = floors(case, truth)
    for name, exact in truth.items():
        assert got[name].dtype == reference[name].dtype, name
        assert got[name].shape == exact.shape, name
        error, usual = ((v[name].double() - exact).abs().max().item() for v in (got, reference))
        assert error <= 2 * usual + allowed[name], f"{name}: {error} against {usual}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("implementation", FORMS)
def test_sizes(implementation: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_as_good_as_reference(draw(shape, dtype), implementation)


@pytest.mark.parametrize("constant", [False, True], ids=["moving", "constant"])
@pytest.mark.parametrize("implementation", FORMS)
def test_a_constant_x(implementation: str, constant: bool) -> None:
    for shape in ((2, 4, 5, 3, 4), (2, 1, 5, 3, 4)):
        assert_as_good_as_reference(draw(shape, torch.float32, constant=constant), implementation)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*(st.integers(1, most) for most in (3, 4, 40, 6, 7))),
    dtype=st.sampled_from(DTYPES),
    implementation=st.sampled_from(FORMS),
    constant=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_drawn(
    shape: tuple[int, ...], dtype: torch.dtype, implementation: str, constant: bool, seed: int
) -> None:
    assert_as_good_as_reference(draw(shape, dtype, constant=constant, seed=seed), implementation)


@pytest.mark.parametrize("wanted", NAMES)
def test_one_gradient_alone_is_as_with_the_others(wanted: str) -> None:
    """And what wants none gets none."""
    case = draw((2, 3, 4, 3, 5), torch.float32)
    expected = run(case, "pytorch")
    inputs = [
        v.clone().requires_grad_(n == wanted) for n, v in zip(NAMES, case.tensors, strict=True)
    ]
    kernels.conv_gru(*inputs, implementation="pytorch").backward(case.dy)
    for name, value in zip(NAMES, inputs, strict=True):
        if name == wanted:
            assert value.grad is not None
            torch.testing.assert_close(value.grad, expected[f"d{name}"], rtol=0, atol=0)
        else:
            assert value.grad is None


@pytest.mark.parametrize("implementation", FORMS)
def test_any_layout_gives_the_same_bits(implementation: str) -> None:
    """Plain contiguous, channels last, a slice; and an upstream gradient of stride 0."""
    case = draw((2, 3, 6, 4, 5), torch.float32)
    x, *parameters = case.tensors
    layouts = {
        "channels last": x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3),
        "slice": torch.cat([x, x], dim=-1)[..., : x.shape[-1]],
    }
    constant = torch.ones((), device=DEVICE).expand_as(case.dy)
    expected = run(case, implementation)
    expected_constant = run(replace(case, dy=constant.contiguous()), implementation)
    for other in layouts.values():
        assert other.stride() != x.stride()
        for dy, bits in ((case.dy, expected), (constant, expected_constant)):
            leaves = [v.detach().requires_grad_() for v in (other, *parameters)]
            y = kernels.conv_gru(*leaves, implementation=implementation)
            got = [y, *torch.autograd.grad(y, leaves, dy)]
            assert all(torch.equal(*pair) for pair in zip(got, bits.values(), strict=True))


@pytest.mark.parametrize("constant", [False, True], ids=["moving", "constant"])
@pytest.mark.parametrize("implementation", FORMS)
@torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
def test_runs_are_bit_equal_and_read_nothing_unwritten(implementation: str, constant: bool) -> None:
    """The second run finds NaN in all memory that it allocates."""
    case = draw((2, 4, 33, 3, 5), torch.float32, constant=constant)
    first = run(case, implementation)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        assert case.dy.new_empty(3).isnan().all()
        second = run(case, implementation)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(value.isfinite().all() for value in first.values())


@pytest.mark.parametrize("implementation", FORMS)
def test_nan_is_not_hidden_by_the_relu(implementation: str) -> None:
    """One pixel spoils those beside it at once, and two further at every later frame.

    Three at once in the reference, which multiplies a NaN r by h = 0.
    """
    case = draw((1, 2, 3, 7, 7), torch.float32)
    case.tensors[0][0, 0, 1, 0, 0] = torch.nan
    y = run(case, implementation)["y"].isnan()
    for frame, reach in ((y[0, 0], 2), (y[0, 1], 4)):
        expected = torch.zeros(7, 7, dtype=torch.bool, device=DEVICE)
        expected[:reach, :reach] = True
        assert torch.equal(frame, expected.expand(3, -1, -1))


@pytest.mark.parametrize("later", [False, True], ids=["first frame", "later frame"])
@pytest.mark.parametrize("implementation", FORMS)
def test_nan_in_the_candidate_alone_reaches_h(implementation: str, later: bool) -> None:
    """With r, u and the h before finite: in a network one NaN reaches all gates at once."""
    shares = torch.tensor([0.0, 0.0, torch.nan], device=DEVICE).view(1, 1, 1, 3)
    h, c, y = torch.ones(3, 1, 1, 1, 1, device=DEVICE)
    ru = torch.full((1, 1, 1, 2), 0.5, device=DEVICE)
    passes(implementation).candidate(shares, torch.zeros_like(h) if later else None, ru, h, c, y)
    assert all(value.isnan().all() for value in (h, c, y))
    assert ru.flatten().tolist() == [0.5, 0.5]


@pytest.mark.parametrize("implementation", FORMS)
def test_the_candidate_s_gradient_passes_where_c_is_nan(implementation: str) -> None:
    """By c > 0 it would be 0 there, and a broken network would stop learning without a word."""
    values = torch.tensor([torch.nan, -0.0, 1e-40, 2.0], device=DEVICE).view(1, 1, 1, 4)
    half = torch.full_like(values, 0.5)
    dz_c, dz_ru = torch.empty_like(values), values.new_empty(1, 1, 1, 8)
    forms = passes(implementation)
    forms.candidate_grad(half, half.clone(), None, None, dz_ru + torch.nan, values, dz_ru, dz_c)
    assert dz_c.isnan().tolist() == [[[[True, False, True, True]]]]  # u was NaN, the relu closed
    ru = torch.full_like(dz_ru, 0.25)
    forms.candidate_grad(half, half.clone(), None, None, ru, values, dz_ru, dz_c)
    assert dz_c.flatten().tolist() == [0.375, 0.0, 0.375, 0.375]
    assert dz_ru[..., 4:].isnan().tolist() == [[[[True, False, False, False]]]]


def test_an_empty_batch() -> None:
    inputs = [v.detach().requires_grad_() for v in draw((1, 2, 3, 4, 4), torch.float32).tensors]
    y = kernels.conv_gru(inputs[0][:0], *inputs[1:])
    assert y.shape == (0, 2, 3, 4, 4)
    y.sum().backward()
    assert inputs[1].grad is not None
    assert not inputs[1].grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 5, 4, 4)}, r"x must be \[B, T, C, H, W\] with at least one frame, not \(2, 5"),
        ({"x": (2, 0, 3, 4, 4)}, "at least one frame"),
        ({"weight_u": (3, 6, 3, 3)}, r"weight_u must be \[3, 3, 3, 6\], not \(3, 6, 3, 3\)"),
        ({"bias_c": (6,)}, r"bias_c must be \[3\]"),
    ],
)
def test_wrong_shapes_are_refused(change: dict[str, tuple[int, ...]], message: str) -> None:
    weight, bias = (3, 3, 3, 6), (3,)
    shapes = dict(
        zip(NAMES, ((2, 2, 3, 4, 4), weight, weight, weight, bias, bias, bias), strict=True)
    )
    with pytest.raises(ValueError, match=message):
        kernels.conv_gru(*(torch.ones(shape) for shape in (shapes | change).values()))


@pytest.mark.gpu
@needs_cuda
def test_bf16_on_a_gpu() -> None:
    for shape in SIZES.values():
        for constant in (False, True):
            case = draw(shape, torch.bfloat16, constant=constant)
            assert_as_good_as_reference(case, "triton")


@pytest.mark.gpu
@needs_cuda
@torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
def test_a_cuda_graph_of_both_passes() -> None:
    case = draw((2, 5, 32, 8, 8), torch.bfloat16)
    expected = run(case, "triton")  # compiles the kernels, too
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(case, "triton")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(case, "triton")
    graph.replay()
    assert all(torch.equal(captured[name], expected[name]) for name in expected)


@pytest.mark.gpu
@needs_cuda
def test_more_than_2_to_the_31_values() -> None:
    """The last sample lies past int32 offsets; it must be as the first."""
    B, H, W, C = 129, 512, 512, 64

    def frames(channels: int) -> Tensor:
        one = torch.randn(1, H, W, channels, device="cuda", dtype=torch.bfloat16)
        return one.repeat(B, 1, 1, 1)

    def check(*results: Tensor) -> None:
        for result in results:
            assert result.numel() > 2**31
            assert all(torch.equal(result[b], result[0]) for b in (64, 128))
            assert result[0].abs().max() > 0

    forms = passes("triton")
    h, ru, other = frames(C), frames(2 * C).sigmoid_(), frames(C)
    forms.reset_update(frames(3 * C), frames(2 * C), h, ru, other)
    check(ru, other)
    c, y = torch.empty_like(h), torch.empty_like(h)
    forms.candidate(frames(3 * C), other, ru, h, c, y)
    check(h, c, y)
    direct, dz_ru, dz_c = frames(C), frames(2 * C), torch.empty_like(h)
    forms.candidate_grad(y, direct, other, h, ru, c, dz_ru, dz_c)
    check(direct, dz_ru, dz_c)
    forms.reset_grad(dz_c, h, ru, dz_ru, direct, other)
    check(direct, dz_ru, other)


@pytest.mark.gpu
@needs_gpu_memory(75)  # fourteen times y's 4.3 GB: the gates, all gradients, and copies of both
def test_all_of_it_past_2_to_the_31_values() -> None:
    """Equal samples, the last of them past int32 offsets: each must be as when it is alone.

    Not bit for bit, as cuDNN may sum otherwise for another batch: in each of two steps r, u, c and
    h, and as many gradients, may be rounded the other way. What parameters are given back is sums
    of these, of either sign, so rounding counts for more; samples past the offsets are half of it.
    """
    case, num_samples = draw((1, 2, 64, 512, 512), torch.bfloat16), 66
    alone = run(case, "triton")
    x, dy = (v.repeat(num_samples, 1, 1, 1, 1) for v in (case.tensors[0], case.dy))
    found = run(Case((x, *case.tensors[1:]), 2, dy), "triton")
    assert found["y"].numel() > 2**31
    for name, expected in alone.items():
        samples = name in ("y", "dx")
        allowed = 2 * 8 * torch.finfo(torch.bfloat16).eps / 2 if samples else 0.25
        for got in found[name][[0, 32, 65]] if samples else [found[name] / num_samples]:
            error = (got.float() - expected.float().view(got.shape)).norm()
            assert error <= allowed * expected.float().norm(), name
