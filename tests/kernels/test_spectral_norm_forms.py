"""Every implementation of the power iteration, of W / σ and of its gradient, against fp64.

On a CPU the Triton kernels run in Triton's interpreter, which computes bf16 wrongly (its stores
truncate): bf16 is for a GPU.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kernels
from engine.models.spectral import spectral_weights
from engine.models.upsampler import UpsamplingGenerator
from kernels.spectral_norm import cuda as power_iteration_cuda
from kernels.spectral_norm import power_iteration_triton

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
FORMS = ("pytorch", "triton")
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")

# Power iteration: tiles are 128 x 256 and 16 x 2048, and rows of 4n values are read in fours.
SHAPES = {
    "one value": (1, 1),
    "one row": (1, 7),
    "one column": (5, 1),
    "odd convolution": (6, 3, 3, 5),
    "one tile exactly": (128, 256),
    "one less than a tile": (127, 255),
    "one more than a tile": (129, 257),
    "two splits of columns, aligned": (17, 2052),
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that is allocated is full of NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape).to(DEVICE)


def draw(shapes: Sequence[tuple[int, ...]]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Weights, u, and v full of NaN, which an iteration overwrites unread."""
    weights = [randn(*shape) for shape in shapes]
    us = [torch.nn.functional.normalize(randn(shape[0]), dim=0) for shape in shapes]
    return weights, us, [torch.full_like(weight[0].flatten(), torch.nan) for weight in weights]


def copies(*lists: list[Tensor], dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    return [[v.to(dtype, copy=True) for v in tensors] for tensors in lists]


def rounding(weight: Tensor) -> float:
    """Of a sum of R terms and one of K: √n roundings of 2⁻²⁴, eightfold."""
    return 8 * (weight.shape[0] + weight[0].numel()) ** 0.5 * 2**-24


# ------------------------------------------------------------------------- power iteration


def test_iterations_against_fp64_bit_equal_and_reading_nothing_unwritten(poisoned: None) -> None:
    """All shapes in one list; then again, one by one."""
    weights, us, vs = draw(list(SHAPES.values()))
    doubles, exact_us, exact_vs = copies(weights, us, vs, dtype=torch.float64)
    again_us, again_vs = copies(us, vs)
    exact = kernels.power_iteration_(doubles, exact_us, exact_vs)
    sigma_L = kernels.power_iteration_(weights, us, vs, implementation="triton")
    for i, weight in enumerate(weights):
        pairs = (us[i], exact_us[i]), (vs[i], exact_vs[i]), (sigma_L[i], exact[i])
        for got, true in pairs:
            error = (got - true).abs().max().item()
            assert error <= rounding(weight) * max(1, true.abs().max().item()), weight.shape
        alone = [weight], [again_us[i]], [again_vs[i]]
        assert torch.equal(
            kernels.power_iteration_(*alone, implementation="triton"), sigma_L[i : i + 1]
        )
        assert torch.equal(again_us[i], us[i])
        assert torch.equal(again_vs[i], vs[i])


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_sigma_is_the_largest_singular_value(implementation: str) -> None:
    """Of matrices whose second is half of it: the error falls by four with each iteration."""
    left, _ = torch.linalg.qr(torch.randn(12, 12))
    right, _ = torch.linalg.qr(torch.randn(20, 12))
    values = 3 * 0.5 ** torch.arange(12.0)
    weight = (left * values @ right.T).to(DEVICE)
    us, vs = [randn(12)], [torch.zeros(20, device=DEVICE)]
    sigma_L = kernels.power_iteration_([weight], us, vs, 14, implementation=implementation)
    assert sigma_L.item() == pytest.approx(3, rel=rounding(weight))
    assert abs(us[0].cpu() @ left[:, 0]).item() == pytest.approx(1, abs=rounding(weight))
    assert abs(vs[0].cpu() @ right[:, 0]).item() == pytest.approx(1, abs=rounding(weight))


def stage2_generator(channels: int) -> UpsamplingGenerator:
    """Kinetics-600's, but for the channels."""
    return UpsamplingGenerator(
        resolution=128,
        channels=channels,
        multipliers=(8, 8, 4, 2, 1),
        temporal="separable_conv",
        low_resolution=32,
        frame_step=2,
        num_classes=600,
        latent_size=8,
        class_embedding_size=8,
    )


def test_launches_for_the_whole_stage_2_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four for its 121 weights, whose number does not depend on the channels."""

    class Counted:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launches.append(self.kernel.__name__)
            return self.kernel[grid]

    launches: list[str] = []
    for name, value in vars(power_iteration_triton).copy().items():
        if name.endswith("_kernel"):
            monkeypatch.setattr(power_iteration_triton, name, Counted(value))
    layers = spectral_weights(stage2_generator(1))
    assert len(layers) == 121
    weights = [layer.weight.to(DEVICE) for layer in layers]
    us, vs = ([getattr(layer, name).to(DEVICE) for layer in layers] for name in "uv")
    exact_us, exact_vs = copies(us, vs)
    sigma_L = kernels.power_iteration_(weights, us, vs, implementation="triton")
    assert launches == [
        "column_sums_kernel",
        "merge_columns_kernel",
        "row_sums_kernel",
        "finish_kernel",
    ]
    exact = kernels.power_iteration_(weights, exact_us, exact_vs, implementation="reference")
    torch.testing.assert_close(sigma_L, exact, rtol=1e-5, atol=0)


def test_weights_off_the_alignment_and_strided() -> None:
    """A slice of a flat buffer, as ZeRO's parameters are, and a transposed weight."""
    weights, us, vs = draw([(20, 264)])
    moved_us, moved_vs = copies(us, vs)
    strided_us, strided_vs = copies(us, vs)
    kernels.power_iteration_(weights, us, vs, implementation="triton")
    buffer = torch.cat([weights[0].new_zeros(1), weights[0].flatten()])
    moved = buffer[1:].view(20, 264)
    assert moved.data_ptr() % 16 == 4
    kernels.power_iteration_([moved], moved_us, moved_vs, implementation="triton")
    strided = weights[0].T.contiguous().T
    kernels.power_iteration_([strided], strided_us, strided_vs, implementation="triton")
    for got in (moved_us + moved_vs, strided_us + strided_vs):
        assert all(torch.equal(a, b) for a, b in zip(got, us + vs, strict=True))


def test_a_moved_weight_is_found_again() -> None:
    """Tables are kept between calls: same shapes, other memory; then the first memory again."""
    weights, us, vs = draw([(6, 10)])
    other_weights, other_us, other_vs = draw([(6, 10)])
    for w, u, v in ((weights, us, vs), (other_weights, other_us, other_vs), (weights, us, vs)):
        exact_u, exact_v = copies(u, v)
        kernels.power_iteration_(w, exact_u, exact_v, implementation="reference")
        kernels.power_iteration_(w, u, v, implementation="triton")
        torch.testing.assert_close(u, exact_u, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(v, exact_v, rtol=1e-5, atol=1e-6)


def test_nan_and_zero() -> None:
    """NaN is not dropped by a maximum; of a zero matrix the vectors become zero, not NaN."""
    weights, us, vs = draw([(20, 30), (20, 30)])
    weights[0][3, 4] = torch.nan
    weights[1].zero_()
    sigma_L = kernels.power_iteration_(weights, us, vs, implementation="triton")
    for broken in (sigma_L[0], us[0], vs[0]):
        assert broken.isnan().all()
    for zero in (sigma_L[1], us[1], vs[1]):
        assert zero.eq(0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": []}, "0 weights, 1 u and 1 v"),
        ({"weights": [], "us": [], "vs": []}, "of no weights"),
        ({"num_iterations": 0}, "0 power iterations"),
        ({"us": [torch.ones(5)]}, r"u must be \[4\], not \(5,\)"),
        ({"vs": [torch.ones(12, dtype=torch.float64)]}, "v must be of its weight's dtype"),
        ({"vs": [torch.ones(24)[::2]]}, "must be contiguous"),
        ({"weights": [torch.ones(0, 3)]}, r"not empty, not \(0, 3\)"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "weights": [torch.ones(4, 3, 4)],
        "us": [torch.ones(4)],
        "vs": [torch.ones(12)],
    }
    with pytest.raises(ValueError, match=message):
        kernels.power_iteration_(**(arguments | change))
    with pytest.raises(ValueError, match=r"u must be \[4\]"):
        kernels.spectral_normalize(torch.ones(4, 3), torch.ones(3), torch.ones(3))


def test_what_runs_and_why() -> None:
    choices = kernels.implementations("cpu")
    assert choices["power_iteration_"].implementation == "reference"
    assert choices["power_iteration_"].reason.startswith("not cuda: tensors are on cpu")
    assert choices["spectral_normalize"].implementation == "reference"
    assert kernels.implementations("meta")["spectral_normalize"].implementation == "pytorch"
    double = kernels.implementations("cuda", torch.float64)["power_iteration_"]
    assert "not cuda: weights are torch.float64, not fp32" in double.reason
    weights, us, vs = draw([(3, 4)])
    if not CUDA:
        with pytest.raises(kernels.ImplementationError, match="cannot run as cuda"):
            kernels.power_iteration_(weights, us, vs, implementation="cuda")


# ------------------------------------------------------------------------ W / σ, its gradient

# One weight: tiles are 8 x 256 or as many values; a program has 8 of them, the most are 1024.
NORMALIZED = SHAPES | {
    "two programs of rows": (65, 256),
    "narrow": (600, 3),
}


def normalized(
    weight: Tensor, u: Tensor, v: Tensor, dtype: torch.dtype, upstream: Tensor, implementation: str
) -> list[Tensor]:
    """Ŵ and dW."""
    leaf = weight.detach().requires_grad_()
    y = kernels.spectral_normalize(leaf, u, v, dtype, implementation=implementation)
    return [y.detach(), *torch.autograd.grad(y, leaf, upstream.to(dtype))]


def assert_as_good_as_reference(
    shape: tuple[int, ...], dtype: torch.dtype, implementation: str
) -> None:
    """Errors, against fp64, at most twice those of the reference, and a floor."""
    [weight], [u], [v] = draw([shape])
    kernels.power_iteration_([weight], [u], [v], 2, implementation="reference")
    upstream = randn(*shape).to(dtype)
    truth = normalized(
        weight.double(), u.double(), v.double(), torch.float64, upstream.double(), "reference"
    )
    reference, got = (
        normalized(weight, u, v, dtype, upstream, i) for i in ("reference", implementation)
    )
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32
    assert got[0].shape == got[1].shape == shape
    for exact, usual, result in zip(truth, reference, got, strict=True):
        error, allowed = ((r.double() - exact).abs().max().item() for r in (result, usual))
        # dW is a difference; of one value it is 0 = dŴ/σ - dŴ/σ.
        terms = max(exact.abs().max(), (upstream.double() / truth_sigma(weight, u, v)).abs().max())
        assert error <= 2 * allowed + rounding(weight) * terms.item()


def truth_sigma(weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return u.double() @ weight.double().flatten(1) @ v.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", NORMALIZED.values(), ids=NORMALIZED.keys())
@pytest.mark.parametrize("implementation", FORMS)
def test_sizes(implementation: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_as_good_as_reference(shape, dtype, implementation)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 12), min_size=2, max_size=4).map(tuple),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    implementation=st.sampled_from(FORMS),
)
def test_drawn(shape: tuple[int, ...], dtype: torch.dtype, implementation: str) -> None:
    torch.manual_seed(sum(shape))
    assert_as_good_as_reference(shape, dtype, implementation)


@pytest.mark.parametrize("implementation", FORMS)
def test_any_layout_gives_the_same_bits(implementation: str) -> None:
    """A strided weight, and upstream gradients that are strided or of stride 0."""
    [weight], [u], [v] = draw([(6, 3, 5)])
    kernels.power_iteration_([weight], [u], [v], implementation="reference")
    upstream = randn(6, 3, 5)
    expected = normalized(weight, u, v, torch.float32, upstream, implementation)
    strided = weight.transpose(0, 2).contiguous().transpose(0, 2)
    flipped = upstream.transpose(0, 1).contiguous().transpose(0, 1)
    for result in (
        normalized(strided, u, v, torch.float32, upstream, implementation),
        normalized(weight, u, v, torch.float32, flipped, implementation),
    ):
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    constant = torch.ones((), device=DEVICE).expand(6, 3, 5)
    results = [
        normalized(weight, u, v, torch.float32, g, implementation)
        for g in (constant, constant.contiguous())
    ]
    assert torch.equal(results[0][1], results[1][1])


def test_runs_are_bit_equal_and_read_nothing_unwritten(poisoned: None) -> None:
    [weight], [u], [v] = draw([(65, 300)])
    kernels.power_iteration_([weight], [u], [v], implementation="reference")
    upstream = randn(65, 300)
    first, second = (normalized(weight, u, v, torch.float16, upstream, "triton") for _ in range(2))
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("implementation", FORMS)
def test_bf16_on_a_gpu(implementation: str) -> None:
    for shape in (*NORMALIZED.values(), (1024, 9216)):
        assert_as_good_as_reference(shape, torch.bfloat16, implementation)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("implementation", ["cuda", "triton"])
def test_a_whole_generator_on_a_gpu(implementation: str) -> None:
    """At full size, in both GPU forms: agreement with fp64 and equal bits."""
    if implementation == "cuda" and (reason := power_iteration_cuda.unavailable()):
        pytest.skip(reason)
    weights, us, vs = draw([tuple(s.weight.shape) for s in spectral_weights(stage2_generator(128))])
    again_us, again_vs = copies(us, vs)
    doubles, exact_us, exact_vs = copies(weights, us, vs, dtype=torch.float64)
    exact = kernels.power_iteration_(doubles, exact_us, exact_vs)
    sigma_L = kernels.power_iteration_(weights, us, vs, implementation=implementation)
    assert torch.equal(
        sigma_L,
        kernels.power_iteration_(weights, again_us, again_vs, implementation=implementation),
    )
    assert all(torch.equal(a, b) for a, b in zip(us + vs, again_us + again_vs, strict=True))
    for i, weight in enumerate(weights):
        pairs = (
            (us[i], exact_us[i]),
            (vs[i], exact_vs[i]),
            (sigma_L[i] / exact[i], exact[i] / exact[i]),
        )
        for got, true in pairs:
            assert (got - true).abs().max().item() <= rounding(weight)
