"""W / σ of a list as PyTorch sees it: derivatives, fakes, compilation, saved memory."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import kernels
from kernels.convolution.folding import FOLDS, fold

FORMS = ("pytorch", "triton")
OPS = torch.ops.sswgan
# One of every fold; few taps, which is what the interpreter's time goes with.
SHAPES = [(3, 5), (2, 3, 3, 2), (3, 1, 1, 4), (2, 2, 1, 1, 3), (2, 1, 2, 1, 3)]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def draw(
    dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Weights, and u and v after some iterations."""
    weights = [torch.randn(shape, dtype=dtype, device=device) for shape in SHAPES]
    us = [torch.randn(len(weight), dtype=dtype, device=device) for weight in weights]
    vs = [torch.zeros(weight[0].numel(), dtype=dtype, device=device) for weight in weights]
    if device != "meta":
        kernels.power_iteration_(weights, us, vs, 3, implementation="reference")
    return [weight.requires_grad_() for weight in weights], us, vs


def normalize(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    implementation: str | None,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    dtypes = [dtype] * (len(weights) - 1) + [None]
    return kernels.spectral_normalize_all(
        weights, us, vs, dtypes, FOLDS[: len(weights)], implementation=implementation
    )


def test_the_list_operators_are_registered_right() -> None:
    weights, us, vs = (tensors[1:3] for tensors in draw())
    weights = [weight.detach() for weight in weights]
    lows, folds = [True, False], [1, 2]
    arguments: Any = weights, us, vs, torch.float16, lows, folds
    torch.library.opcheck(OPS.spectral_normalize_all.default, arguments)
    kernels_, sigma_L = OPS.spectral_normalize_all(*arguments)
    dys = [torch.randn_like(kernel) for kernel in kernels_]
    arguments = dys, weights, us, vs, sigma_L, folds
    torch.library.opcheck(OPS.spectral_normalize_all_dw.default, arguments)


@pytest.mark.parametrize("implementation", ["reference", "pytorch"])
def test_first_and_second_derivatives_of_lists(implementation: str) -> None:
    """In fp64, by finite differences, u and v constant."""
    weights, us, vs = draw(torch.float64)

    def run(*weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(normalize(weights, us, vs, implementation))

    assert torch.autograd.gradcheck(run, weights)
    assert torch.autograd.gradgradcheck(run, weights)


def test_second_derivatives_of_the_triton_list() -> None:
    """They are the reference's: in fp32 equal up to rounding, of terms as large as the largest."""
    weights, us, vs = draw()
    second = []
    for implementation in ("reference", "triton"):
        ys = normalize(weights, us, vs, implementation)
        dws = torch.autograd.grad(ys, weights, [y.detach() ** 2 for y in ys], create_graph=True)
        total = sum((dw.square().sum() for dw in dws), torch.zeros(()))
        second.append(torch.autograd.grad(total, weights))
    for reference, got in zip(*second, strict=True):
        assert reference.any()
        torch.testing.assert_close(got, reference, rtol=1e-4, atol=1e-5 * reference.abs().max())


@pytest.mark.parametrize("implementation", ["reference", *FORMS])
def test_what_has_no_gradient(implementation: str) -> None:
    """u, v, and weights whose kernel is not used; a weight that needs none changes nothing."""
    weights, us, vs = draw()
    weights[1].requires_grad_(False)
    for vector in us + vs:
        vector.requires_grad_()
    ys = normalize(weights, us, vs, implementation)
    (ys[0].sum() + ys[2].sum() + ys[1].sum()).backward()
    assert all(vector.grad is None for vector in us + vs)
    assert weights[1].grad is None
    for i in (0, 2):
        alone = weights[i].detach().requires_grad_()
        y = fold(
            kernels.spectral_normalize(alone, us[i], vs[i], implementation="reference"), FOLDS[i]
        )
        y.sum().backward()
        torch.testing.assert_close(weights[i].grad, alone.grad, rtol=1e-5, atol=1e-6)
    assert weights[4].grad is None or not weights[4].grad.any()


def test_the_list_backward_operator_refuses_derivatives() -> None:
    weights, us, vs = draw()
    dys = [torch.randn_like(weight) for weight in weights]
    none = [0] * len(weights)
    arguments: Any = dys, weights, us, vs, torch.ones(len(weights)), none
    with pytest.raises(RuntimeError, match="spectral_normalize_all_dw has no derivative"):
        OPS.spectral_normalize_all_dw(*arguments)


@pytest.mark.parametrize(
    ("implementation", "update"), [("pytorch", "reference"), ("triton", "triton")]
)
def test_an_iteration_before_the_lists_backward_is_found(implementation: str, update: str) -> None:
    """It changes u and v, and a gradient with the new ones would be wrong."""
    weights, us, vs = draw()
    ys = normalize(weights, us, vs, implementation)
    kernels.power_iteration_(weights, us, vs, implementation=update)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(ys[0].sum(), weights[0])


@pytest.mark.parametrize("implementation", ["reference", *FORMS])
def test_compiled_and_checkpointed_lists_equal_eager(implementation: str) -> None:
    weights, us, vs = draw()

    def run(*weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(normalize(weights, us, vs, implementation, torch.float16))

    def rerun(*weights: Tensor) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = checkpoint(run, *weights, use_reentrant=False)
        return result

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    upstream = [torch.randn_like(y) for y in run(*weights)]
    results = []
    for function in (run, compiled, rerun):
        ys = function(*weights)
        results.append([*ys, *torch.autograd.grad(ys, weights, upstream)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("implementation", FORMS)
def test_what_a_list_saves_is_the_parameters_and_a_number_each(
    implementation: str, device: str
) -> None:
    weights, us, vs = draw(device=device)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        normalize(weights, us, vs, implementation, torch.float16)
    assert all(any(tensor is weight for tensor in saved) for weight in weights)
    own = {t.untyped_storage()._cdata for t in (*weights, *us, *vs)}
    held = {t.untyped_storage()._cdata: t for t in saved}
    more = [held[storage] for storage in held.keys() - own]
    assert sum(t.untyped_storage().nbytes() for t in more) == 4 * len(weights)  # σ


@pytest.mark.parametrize("implementation", [None, *FORMS])
def test_meta_lists_have_the_folded_shapes(implementation: str | None) -> None:
    weights, us, vs = draw(device="meta")
    ys = normalize(weights, us, vs, implementation, torch.bfloat16)
    shapes = [(3, 5), (2, 4, 4, 2), (3, 2, 2, 4), (2, 2, 2, 2, 3), (2, 2, 3, 2, 3)]
    assert [tuple(y.shape) for y in ys] == shapes
    assert [y.dtype for y in ys] == [torch.bfloat16] * 4 + [torch.float32]
    dws = torch.autograd.grad(ys, weights, [torch.empty_like(y) for y in ys])
    assert [tuple(dw.shape) for dw in dws] == SHAPES
    assert all(dw.dtype == torch.float32 for dw in dws)
