"""W / σ of lists of weights, folded and cast, and its gradients, in every form against fp64.

On a CPU the Triton kernels run in Triton's interpreter, which computes bf16 wrongly (its stores
truncate): bf16 is for a GPU.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kernels
from engine.models.spectral import spectral_weights
from engine.models.upsampler import UpsamplingGenerator
from kernels.convolution.folding import FOLDS, fold, unfold
from kernels.spectral_norm import network_tables, network_triton, power_iteration_triton
from kernels.spectral_norm.network_tables import PIECE, taps_of

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
FORMS = ("pytorch", "triton")
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")

# Pieces are 256 x 128, tiles in them 16 x 128, and rows of 4n values are read in fours.
SHAPES: dict[str, tuple[tuple[int, ...], kernels.Fold]] = {
    "one value": ((1, 1), None),
    "one row": ((1, 7), None),
    "one column": ((5, 1), None),
    "odd convolution": ((3, 3, 3, 5), None),
    "one block of columns, aligned": ((17, 128), None),
    "one less than a block": ((15, 127), None),
    "one more than a block": ((2, 129), None),
    "one less than a run of rows": ((255, 3), None),
    "two runs of rows": ((257, 4), None),
    "upsampling, aligned": ((5, 3, 3, 8), "upsampling"),
    "upsampling, odd channels": ((3, 3, 3, 5), "upsampling"),
    "upsampling, one channel": ((1, 3, 3, 1), "upsampling"),
    "upsampling, two blocks of channels": ((1, 3, 3, 132), "upsampling"),
    "pooling 2x2": ((4, 3, 3, 4), (2, 2)),
    "pooling 2x2 after a 1x1 convolution": ((3, 1, 1, 6), (2, 2)),
    # Of fewer taps than 3 x 3 x 3, which take the interpreter long.
    "pooling 1x2x2": ((3, 3, 1, 2, 4), (1, 2, 2)),
    "pooling 2x2x2, odd channels": ((2, 2, 2, 1, 3), (2, 2, 2)),
}


class Drawn(NamedTuple):
    """Arguments, and an upstream gradient for every kernel."""

    weights: list[Tensor]
    us: list[Tensor]
    vs: list[Tensor]
    folds: list[kernels.Fold]
    upstream: list[Tensor]

    def double(self) -> "Drawn":
        lists = self.weights, self.us, self.vs, self.upstream
        weights, us, vs, upstream = ([t.double() for t in tensors] for tensors in lists)
        return Drawn(weights, us, vs, self.folds, upstream)


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


def draw(
    cases: Sequence[tuple[tuple[int, ...], kernels.Fold]], dtype: torch.dtype = torch.float32
) -> Drawn:
    """Singular vectors after an iteration; upstream gradients that `dtype` can hold."""
    weights = [randn(*shape) for shape, _ in cases]
    us = [torch.nn.functional.normalize(randn(shape[0]), dim=0) for shape, _ in cases]
    vs = [torch.zeros_like(weight[0].flatten()) for weight in weights]
    kernels.power_iteration_(weights, us, vs, implementation="reference")
    folds = [how for _, how in cases]
    upstream = [randn(*fold(w, how).shape).to(dtype) for w, how in zip(weights, folds, strict=True)]
    return Drawn(weights, us, vs, folds, upstream)


def results(
    drawn: Drawn, dtypes: Sequence[torch.dtype | None], implementation: str
) -> tuple[list[Tensor], list[Tensor]]:
    """(Every kernel, every dW)."""
    leaves = [weight.detach().requires_grad_() for weight in drawn.weights]
    ys = kernels.spectral_normalize_all(
        leaves, drawn.us, drawn.vs, dtypes, drawn.folds, implementation=implementation
    )
    upstream = [g.to(y.dtype) for g, y in zip(drawn.upstream, ys, strict=True)]
    return [y.detach() for y in ys], list(torch.autograd.grad(ys, leaves, upstream))


def equal(first: Any, second: Any) -> bool:
    """Two `results`, bit for bit."""
    return all(
        torch.equal(a, b)
        for x, y in zip(first, second, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def assert_as_good_as_reference(
    drawn: Drawn, dtypes: Sequence[torch.dtype | None], implementation: str
) -> None:
    """Errors, against fp64, at most twice those of the reference, and a floor.

    The floor, eightfold: σ and ⟨dŴ, W⟩ are sums of R terms and of K, of √n roundings of 2⁻²⁴; they
    scale everything that is subtracted. A folded tap is a sum of eight at most.
    """
    truth = results(drawn.double(), [None] * len(dtypes), "reference")
    reference, got = (results(drawn, dtypes, form) for form in ("reference", implementation))
    for i, weight in enumerate(drawn.weights):
        assert got[0][i].dtype == (dtypes[i] or torch.float32)
        assert got[1][i].dtype == torch.float32
        assert got[1][i].shape == weight.shape
        rounding = 8 * (weight.shape[0] + weight[0].numel()) ** 0.5 * 2**-24
        sigma = drawn.us[i].double() @ weight.double().flatten(1) @ drawn.vs[i].double()
        # dW is a difference; of one value it is 0 = dŴ/σ - dŴ/σ.
        subtracted = unfold(drawn.upstream[i].double(), drawn.folds[i]).abs().max() / sigma.abs()
        for which, terms in ((0, truth[0][i].abs().max()), (1, truth[1][i].abs().max())):
            exact, usual, result = truth[which][i], reference[which][i], got[which][i]
            assert result.shape == exact.shape
            error, allowed = ((r.double() - exact).abs().max().item() for r in (result, usual))
            scale = max(terms.item(), subtracted.item() if which else 0.0)
            assert error <= 2 * allowed + rounding * scale, (weight.shape, drawn.folds[i], which)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("implementation", FORMS)
def test_all_sizes_and_folds_in_one_list(implementation: str, dtype: torch.dtype) -> None:
    drawn = draw(list(SHAPES.values()), dtype)
    assert_as_good_as_reference(drawn, [dtype] * len(drawn.weights), implementation)


@pytest.mark.parametrize("implementation", FORMS)
def test_every_weight_has_its_own_dtype(implementation: str) -> None:
    """None is the weight's own; here fp16 stands for either that has 16 bits."""
    names = ("one row", "odd convolution", "pooling 1x2x2", "pooling 2x2x2, odd channels")
    drawn = draw([SHAPES[name] for name in names])
    dtypes = [None, torch.float16] * 2
    assert_as_good_as_reference(drawn, dtypes, implementation)
    alone, mixed = (results(drawn, which, implementation) for which in ([None] * 4, dtypes))
    assert all(torch.equal(mixed[0][i], alone[0][i]) for i in (0, 2))
    assert all(torch.equal(mixed[0][i], alone[0][i].half()) for i in (1, 3))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 6), st.integers(1, 9), st.sampled_from(FOLDS)),
        min_size=1,
        max_size=3,
    ),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    implementation=st.sampled_from(FORMS),
)
def test_drawn_lists(
    sizes: list[tuple[int, int, kernels.Fold]], dtype: torch.dtype, implementation: str
) -> None:
    torch.manual_seed(len(sizes))
    cases = [
        ((rows, *((3, 3) if how == "upsampling" else (2,) * len(how or ())), channels), how)
        for rows, channels, how in sizes
    ]
    drawn = draw(cases, dtype)
    assert_as_good_as_reference(drawn, [dtype] * len(cases), implementation)


def test_many_small_weights_and_a_large_one_each_as_alone(poisoned: None) -> None:
    """A weight's bits do not depend on the others, on where it stands, or on what memory held."""
    cases = [
        SHAPES[name]
        for name in ("one value", "pooling 2x2 after a 1x1 convolution", "pooling 1x2x2")
    ]
    cases = [*cases * 2, ((260, 140), None), *cases]
    drawn = draw(cases)
    first, second = (results(drawn, [torch.float16] * len(cases), "triton") for _ in range(2))
    assert equal(first, second)
    assert all(t.isfinite().all() for t in first[0] + first[1])
    for i in (0, 4, 6, 9):
        one = Drawn(*([ts[i]] for ts in drawn))  # type: ignore[arg-type]
        assert equal(results(one, [torch.float16], "triton"), [[ts[i]] for ts in first])


@pytest.mark.parametrize(
    "name", ["odd convolution", "one block of columns, aligned", "pooling 2x2"]
)
def test_any_layout_and_alignment_gives_the_same_bits(name: str) -> None:
    """A strided weight; a slice of a flat buffer, as ZeRO's parameters are; strided gradients and
    such of stride 0; a gradient off the alignment."""
    shape, how = SHAPES[name]
    drawn = draw([(shape, how)])
    expected = results(drawn, [None], "triton")

    def moved(tensor: Tensor) -> Tensor:
        buffer = torch.cat([tensor.new_zeros(1), tensor.flatten()])
        assert buffer[1:].data_ptr() % 16 == 4
        return buffer[1:].view(tensor.shape)

    def strided(tensor: Tensor) -> Tensor:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)

    [weight], [upstream] = drawn.weights, drawn.upstream
    for change in (moved, strided):
        assert equal(results(drawn._replace(weights=[change(weight)]), [None], "triton"), expected)
        other = drawn._replace(upstream=[change(upstream)])
        assert equal(results(other, [None], "triton"), expected)
    constant = torch.ones((), device=DEVICE).expand(upstream.shape)
    ones = (drawn._replace(upstream=[g]) for g in (constant, constant.contiguous()))
    assert equal(*(results(one, [None], "triton") for one in ones))


def test_nan_and_zero() -> None:
    """Of one weight, they are its own: NaN is in all of its kernel, a zero σ gives no number."""
    drawn = draw([((20, 30), None), ((20, 30), None), ((5, 3, 3, 8), "upsampling")])
    expected = results(drawn, [None] * 3, "triton")
    drawn.weights[0][3, 4] = torch.nan
    drawn.weights[1].zero_()
    ys, dws = results(drawn, [None] * 3, "triton")
    for broken in (*ys[:2], *dws[:2]):
        assert not broken.isfinite().any()
    assert torch.equal(ys[2], expected[0][2])
    assert torch.equal(dws[2], expected[1][2])


def test_a_tap_is_a_sum_of_taps() -> None:
    """By hand, as `kernels...folding` draws it: [w0, w0 + w1, w1 + w2, w2], flipped or averaged."""
    pooled = taps_of((1, 3), (2, 2))
    assert pooled.fold == [[0], [0, 1], [1, 2], [2]] * 2
    assert pooled.unfold == [[0, 1, 4, 5], [1, 2, 5, 6], [2, 3, 6, 7]]
    assert pooled.divisor == 4
    upsampled = taps_of((3, 3), "upsampling")
    assert upsampled.divisor == 1
    assert upsampled.fold[0] == [8]  # the last corner comes first
    assert upsampled.fold[5] == [4, 5, 7, 8]
    assert taps_of((3, 3, 3), (2, 2, 2)).divisor == 8


@pytest.mark.parametrize("how", FOLDS, ids=str)
def test_unfolding_is_the_adjoint_of_folding(how: kernels.Fold) -> None:
    shape = (2, *((3,) * (2 if how == "upsampling" else len(how or ()))), 4)
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    folded = fold(weight, how)
    upstream = torch.randn_like(folded)
    [expected] = torch.autograd.grad(folded, weight, upstream)
    torch.testing.assert_close(unfold(upstream, how), expected, rtol=1e-14, atol=1e-14)


class _Counted:
    """Writes down what is launched."""

    def __init__(self, kernel: Any, launches: list[str]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.launches.append(self.kernel.__name__)
        return self.kernel[grid]


def test_six_launches_for_the_whole_stage_2_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kinetics-600's but for the channels, on which the number does not depend: four for the power
    iteration, two for all kernels, and then two for all gradients."""
    launches: list[str] = []
    for module in (power_iteration_triton, network_triton):
        for name, value in vars(module).copy().items():
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, _Counted(value, launches))
    generator = UpsamplingGenerator(
        resolution=128, channels=1, multipliers=(8, 8, 4, 2, 1), temporal="separable_conv",
        low_resolution=32, frame_step=2, num_classes=600, latent_size=8, class_embedding_size=8,
    )  # fmt: skip
    layers = spectral_weights(generator)
    assert len(layers) == 121
    weights = [layer.weight.detach().to(DEVICE).requires_grad_() for layer in layers]
    us, vs = ([getattr(layer, name).to(DEVICE) for layer in layers] for name in "uv")
    # The first convolution of every unit's second block upsamples.
    folded = {m for n, m in generator.named_modules() if n.endswith("block2.conv1.normalized")}
    folds: list[kernels.Fold] = ["upsampling" if layer in folded else None for layer in layers]
    assert folds.count("upsampling") == 5
    kernels.power_iteration_(weights, us, vs, implementation="triton")
    dtypes = [torch.float16] * len(weights)
    ys = kernels.spectral_normalize_all(weights, us, vs, dtypes, folds, implementation="triton")
    assert launches[4:] == ["sigma_kernel", "normalize_kernel"]
    assert len(launches) == 6
    torch.autograd.grad(ys, weights, [torch.ones_like(y) for y in ys])
    assert launches[6:] == ["inner_kernel", "dw_kernel"]
    expected = kernels.spectral_normalize_all(
        weights, us, vs, dtypes, folds, implementation="reference"
    )
    for y, other in zip(ys, expected, strict=True):
        # Both are within half a unit of fp16 of nearly the same number.
        torch.testing.assert_close(y, other, rtol=2**-10, atol=2**-24)


def test_lists_are_cut_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Same shapes, other memory: the tables of work are there already, the addresses are new."""
    drawn, other = (draw(list(SHAPES.values())[:3]) for _ in range(2))
    first = results(drawn, [None] * 3, "triton")
    misses = network_tables.cut.cache_info().misses
    assert not equal(results(other, [None] * 3, "triton"), first)
    assert equal(results(drawn, [None] * 3, "triton"), first)
    assert network_tables.cut.cache_info().misses == misses
    assert PIECE == (256, 128)  # what SHAPES is about


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": [], "us": [], "vs": []}, "of no weights"),
        ({"dtypes": []}, "1 weights, 0 dtypes and 1 folds"),
        ({"folds": [None, None]}, "1 weights, 1 dtypes and 2 folds"),
        ({"us": [torch.ones(5)]}, r"u must be \[4\], not \(5,\)"),
        ({"folds": ["upsampling"]}, r"weights \[O, 3, 3, I\], not \(4, 3, 4\)"),
        ({"folds": [(2, 2)]}, r"pooling \(2, 2\) does not fit"),
        ({"folds": [(3, 3)]}, r"must be upsampling or a pooling, not \(3, 3\)"),
        ({"dtypes": [torch.float64]}, "one 16-bit dtype, not torch.float64"),
    ],
)
def test_wrong_lists_are_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "weights": [torch.ones(4, 3, 4)],
        "us": [torch.ones(4)],
        "vs": [torch.ones(12)],
        "dtypes": [None],
        "folds": [None],
    }
    with pytest.raises(ValueError, match=message):
        kernels.spectral_normalize_all(**(arguments | change))


def test_two_dtypes_of_16_bits_are_refused() -> None:
    ones = [torch.ones(2, 2)] * 2, [torch.ones(2)] * 2, [torch.ones(2)] * 2
    with pytest.raises(ValueError, match=r"not torch\.bfloat16, torch\.float16"):
        kernels.spectral_normalize_all(*ones, [torch.float16, torch.bfloat16], [None, None])


def test_which_form_runs_and_why() -> None:
    name = "spectral_normalize_all"
    assert kernels.implementations("cpu")[name].implementation == "pytorch"
    assert kernels.implementations("meta")[name].implementation == "pytorch"
    assert kernels.chosen(name, torch.device("cuda"), torch.float64) == "pytorch"
    with kernels.use("reference"):
        assert kernels.chosen(name, torch.device("cpu"), torch.float32) == "reference"
    double = kernels.implementations("cuda", torch.float64)[name]
    assert "not triton: float64" in double.reason
    drawn = draw([((2, 3), None)]).double()
    with pytest.raises(kernels.ImplementationError, match="cannot run as triton"):
        results(drawn, [None], "triton")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("implementation", FORMS)
def test_bf16_lists_on_a_gpu(implementation: str) -> None:
    cases = [*SHAPES.values(), ((1024, 3, 3, 1024), "upsampling"), ((600, 9216), None)]
    drawn = draw(cases, torch.bfloat16)
    assert_as_good_as_reference(drawn, [torch.bfloat16] * len(cases), implementation)
