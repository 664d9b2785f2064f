"""Power iteration against an SVD, and the gradient of W / σ."""

import pytest
import torch
from torch import Tensor

import kernels


@pytest.mark.parametrize("shape", [(6, 3, 3, 4), (12, 5), (1, 7), (5, 1)])
def test_sigma_converges_to_the_largest_singular_value(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64)
    u = torch.randn(shape[0], dtype=torch.float64)
    v = torch.zeros(weight[0].numel(), dtype=torch.float64)
    kernels.power_iteration_([weight], [u], [v], num_iterations=500)
    top = torch.linalg.matrix_norm(weight.flatten(1), ord=2)
    torch.testing.assert_close(weight / top, kernels.spectral_normalize(weight, u, v))


def test_one_iteration_is_v_then_u_for_every_layer_in_place() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(4, 3, 3, 2), torch.randn(5, 6)]
    us, vs = [torch.randn(4), torch.randn(5)], [torch.randn(18), torch.randn(6)]
    expected = []
    for weight, u in zip(weights, us, strict=True):
        v = weight.flatten(1).T @ u
        v = v / v.norm()
        new_u = weight.flatten(1) @ v
        expected.append((new_u / new_u.norm(), v))
    kernels.power_iteration_(weights, us, vs)
    for u, v, (expected_u, expected_v) in zip(us, vs, expected, strict=True):
        torch.testing.assert_close(u, expected_u)
        torch.testing.assert_close(v, expected_v)


def test_power_iteration_is_not_tracked() -> None:
    weight = torch.randn(4, 6, requires_grad=True)
    u, v = torch.randn(4), torch.randn(6)
    kernels.power_iteration_([weight], [u], [v])
    assert not u.requires_grad
    assert not v.requires_grad


def test_gradient_holds_u_and_v_constant() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    u, v = torch.randn(4, dtype=torch.float64), torch.randn(6, dtype=torch.float64)

    def normalize(weight: Tensor) -> Tensor:
        return kernels.spectral_normalize(weight, u, v)

    assert torch.autograd.gradcheck(normalize, [weight])
    sigma = u @ weight.flatten(1) @ v
    upstream = torch.randn_like(weight)
    (got,) = torch.autograd.grad(normalize(weight), [weight], upstream)
    inner = (upstream * weight / sigma).sum()
    outer = torch.outer(u, v).view_as(weight)
    torch.testing.assert_close(got, ((upstream - inner * outer) / sigma).detach())


def test_normalises_before_casting() -> None:
    torch.manual_seed(0)
    weight, u, v = torch.randn(4, 6), torch.randn(4), torch.randn(6)
    exact = weight.double() / (u.double() @ weight.double() @ v.double())
    got = kernels.spectral_normalize(weight, u, v, torch.bfloat16)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, exact.bfloat16(), rtol=0, atol=0)
