"""Spectral normalisation as PyTorch sees it: derivatives, fakes, compilation, saved memory."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import kernels

FORMS = ("pytorch", "triton")
OPS = torch.ops.sswgan


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, and u and v after some iterations."""
    weight = torch.randn(*shape, dtype=dtype)
    u, v = torch.randn(shape[0], dtype=dtype), torch.zeros(weight[0].numel(), dtype=dtype)
    kernels.power_iteration_([weight], [u], [v], 3)
    return weight.requires_grad_(), u, v


@pytest.mark.parametrize("implementation", FORMS)
def test_operators_are_registered_right(implementation: str) -> None:
    weight, u, v = draw(5, 3, 2)
    torch.library.opcheck(
        OPS.spectral_normalize.default, (weight, u, v, torch.float16, implementation)
    )
    arguments = torch.randn(5, 3, 2), weight.detach(), u, v, torch.tensor(2.0), implementation
    torch.library.opcheck(OPS.spectral_normalize_dw.default, arguments)


def test_the_power_iteration_is_registered_right() -> None:
    (w1, u1, v1), (w2, u2, v2) = draw(5, 3, 2), draw(4, 6)
    lists = [w1.detach(), w2.detach()], [u1, u2], [v1, v2]
    torch.library.opcheck(OPS.power_iteration_.default, (*lists, 1, "triton"))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_the_power_iteration_compiled_equals_eager(implementation: str) -> None:
    """In one graph, which writes u and v in place as eager does."""
    (w1, u1, v1), (w2, u2, v2) = draw(5, 3, 2), draw(4, 6)
    compiled = torch.compile(kernels.power_iteration_, fullgraph=True, backend="aot_eager")
    results = []
    for function in (kernels.power_iteration_, compiled):
        us, vs = [u1.clone(), u2.clone()], [v1.clone(), v2.clone()]
        sigma = function([w1, w2], us, vs, 2, implementation=implementation)
        results.append([sigma, *us, *vs])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert not any(torch.equal(*pair) for pair in zip(us + vs, (u1, u2, v1, v2), strict=True))


@pytest.mark.parametrize("implementation", ["reference", "pytorch"])
def test_first_and_second_derivatives(implementation: str) -> None:
    """In fp64, by finite differences, u and v constant and no singular vectors at all."""
    weight, u, v = torch.randn(4, 2, 3), torch.randn(4), torch.randn(6)
    leaf = weight.double().requires_grad_()

    def normalize(weight: Tensor) -> Tensor:
        return kernels.spectral_normalize(
            weight, u.double(), v.double(), implementation=implementation
        )

    assert torch.autograd.gradcheck(normalize, leaf)
    assert torch.autograd.gradgradcheck(normalize, leaf)


def test_second_derivatives_of_the_triton_form() -> None:
    """They are the reference's: in fp32 equal up to rounding."""
    weight, u, v = draw(6, 5)
    second = []
    for implementation in ("reference", "triton"):
        y = kernels.spectral_normalize(weight, u, v, implementation=implementation)
        [dw] = torch.autograd.grad(y, weight, y.detach() ** 2, create_graph=True)
        second.append(torch.autograd.grad(dw.square().sum(), weight)[0])
    assert second[0].abs().max() > 0.01
    torch.testing.assert_close(second[1], second[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", *FORMS])
def test_u_and_v_are_constants(implementation: str) -> None:
    weight, u, v = draw(4, 6)
    y = kernels.spectral_normalize(
        weight, u.requires_grad_(), v.requires_grad_(), implementation=implementation
    )
    y.sum().backward()
    assert weight.grad is not None
    assert u.grad is None
    assert v.grad is None


def test_the_backward_operator_refuses_derivatives() -> None:
    weight, u, v = draw(4, 6)
    with pytest.raises(RuntimeError, match="spectral_normalize_dw has no derivative"):
        OPS.spectral_normalize_dw(torch.randn(4, 6), weight, u, v, torch.tensor(2.0), "pytorch")


@pytest.mark.parametrize(
    ("implementation", "update"), [("pytorch", "reference"), ("triton", "triton")]
)
def test_an_iteration_between_forward_and_backward_is_found(
    implementation: str, update: str
) -> None:
    """It changes u and v, and a gradient with the new ones would be wrong."""
    weight, u, v = draw(4, 6)
    y = kernels.spectral_normalize(weight, u, v, implementation=implementation)
    kernels.power_iteration_([weight], [u], [v], implementation=update)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("implementation", ["reference", *FORMS])
def test_compiled_and_checkpointed_equal_eager(implementation: str) -> None:
    weight, u, v = draw(5, 3, 4)
    upstream = torch.randn(5, 3, 4).half()

    def normalize(weight: Tensor) -> Tensor:
        return kernels.spectral_normalize(
            weight, u, v, torch.float16, implementation=implementation
        )

    def rerun(weight: Tensor) -> Tensor:
        result: Tensor = checkpoint(normalize, weight, use_reentrant=False)
        return result

    compiled = torch.compile(normalize, fullgraph=True, backend="aot_eager")
    results = []
    for function in (normalize, compiled, rerun):
        y = function(weight)
        results.append([y.detach(), *torch.autograd.grad(y, weight, upstream)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("implementation", FORMS)
def test_what_is_saved_is_the_parameter_itself_and_one_number(
    implementation: str, device: str
) -> None:
    """Not a view of it: DeepSpeed's ZeRO-3 empties the parameter between forward and backward."""
    weight = torch.nn.Parameter(torch.randn(16, 3, 3, 8, device=device))
    u, v = torch.randn(16, device=device), torch.randn(72, device=device)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        kernels.spectral_normalize(weight, u, v, torch.bfloat16 if device == "meta" else None)
    assert any(tensor is weight for tensor in saved)
    own, held = ({t.untyped_storage()._cdata: t for t in ts} for ts in ((weight, u, v), saved))
    more = [held[storage] for storage in held.keys() - own.keys()]
    assert sum(tensor.untyped_storage().nbytes() for tensor in more) == 4  # σ


def test_meta_tensors_have_shapes_and_dtypes() -> None:
    """The fakes of the operators, which every implementation shares."""
    weight = torch.empty(8, 3, 3, 4, device="meta", requires_grad=True)
    u, v = torch.empty(8, device="meta"), torch.empty(36, device="meta")
    arguments: Any = ([weight], [u], [v])
    assert kernels.power_iteration_(*arguments, implementation="triton").shape == (1,)
    y = kernels.spectral_normalize(weight, u, v, torch.bfloat16, implementation="triton")
    assert (y.shape, y.dtype) == (weight.shape, torch.bfloat16)
    [dw] = torch.autograd.grad(y, weight, torch.empty_like(y))
    assert (dw.shape, dw.dtype) == (weight.shape, torch.float32)
