"""W / σ of a single weight and its gradient: equations in `kernels.spectral_norm`.

Implementations: "triton" (two launches each, for fp32 weights on a GPU), "pytorch" and "reference",
which is the default on a CPU. Bytes for N values with Ŵ in bf16: Ŵ 6·N and dW 10·N if what is read
again is still in the L2 cache, else 10·N and 12·N.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import (
    REFERENCE,
    Implementation,
    Operator,
    everywhere,
    triton_not_preferred,
)
from kernels.registration import operator
from kernels.spectral_norm.arguments import check, fp32_triton_unsupported


def _pytorch_not_preferred(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why "auto" does not run the closed form in PyTorch on a CPU."""
    if device.type != "cpu":
        return None
    return "on a CPU an operator's overhead is more than it saves on all but large weights"


SPECTRAL_NORMALIZE = Operator(
    "spectral_normalize",
    Implementation("triton", fp32_triton_unsupported, triton_not_preferred),
    Implementation("pytorch", everywhere, _pytorch_not_preferred),
)

# ------------------------------------------------------------------------------- references


def spectral_normalize_reference(
    weight: Tensor, u_R: Tensor, v_K: Tensor, dtype: torch.dtype
) -> Tensor:
    """W / (uᵀ W v) in `dtype`, differentiable in W."""
    sigma = torch.dot(u_R, weight.flatten(1).mv(v_K))
    return (weight / sigma).to(dtype)


# -------------------------------------------------------------------- operators and fakes


@operator("spectral_normalize")
def normalize_operator(
    weight: Tensor, u_R: Tensor, v_K: Tensor, dtype: torch.dtype, implementation: str
) -> tuple[Tensor, Tensor]:
    """(Ŵ, σ). The weight as it is, not a view: what is saved must be the parameter itself, so that
    ZeRO-3 can drop and gather its values between the forward and the backward pass."""
    if implementation == "pytorch":
        sigma = torch.dot(u_R, weight.flatten(1).mv(v_K))
        return (weight / sigma).to(dtype), sigma
    from kernels.spectral_norm import weight_triton

    return weight_triton.normalize(weight, u_R, v_K, dtype)


@torch.library.register_fake(normalize_operator)
def _(
    weight: Tensor, u_R: Tensor, v_K: Tensor, dtype: torch.dtype, implementation: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight, dtype=dtype), weight.new_empty(())


@operator("spectral_normalize_dw")
def gradient_operator(
    dy: Tensor, weight: Tensor, u_R: Tensor, v_K: Tensor, sigma: Tensor, implementation: str
) -> Tensor:
    """dW, from dŴ."""
    if implementation == "pytorch":
        dy = dy.to(weight.dtype)
        inner = torch.dot(dy.flatten(), weight.flatten()) / sigma
        dw_RK = torch.addr(dy.flatten(1), u_R, v_K * -inner).div_(sigma)
        return dw_RK.view(weight.shape)
    from kernels.spectral_norm import weight_triton

    return weight_triton.gradient(dy, weight, u_R, v_K, sigma)


@torch.library.register_fake(gradient_operator)
def _(dy: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(weight)


# ------------------------------------------------------------------------------- autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    weight, u_R, v_K, _, ctx.implementation = inputs
    ctx.save_for_backward(weight, u_R, v_K, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else a zero for σ is made per weight and pass


def _backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, None, None, None, None]:
    if dy is None:
        return None, None, None, None, None
    weight, u_R, v_K, sigma = ctx.saved_tensors
    if torch.is_grad_enabled():  # a graph of the backward pass is wanted
        dw = _differentiable_gradient(dy, weight, u_R, v_K)
    else:
        dw = gradient_operator(dy.contiguous(), weight, u_R, v_K, sigma, ctx.implementation)
    return dw, None, None, None, None


def _differentiable_gradient(dy: Tensor, weight: Tensor, u_R: Tensor, v_K: Tensor) -> Tensor:
    """The closed form in plain operators, σ a function of W."""
    sigma = torch.dot(u_R, weight.flatten(1).mv(v_K))
    dy = dy.to(weight.dtype)
    inner = (dy * weight).sum() / sigma
    return (dy - (inner * torch.outer(u_R, v_K)).view(weight.shape)) / sigma


torch.library.register_autograd(normalize_operator, _backward, setup_context=_save)

# ------------------------------------------------------------------------ public functions


def spectral_normalize(
    weight: Tensor,
    u_R: Tensor,
    v_K: Tensor,
    dtype: torch.dtype | None = None,
    *,
    implementation: str | None = None,
) -> Tensor:
    """W / (uᵀ W v), cast to `dtype` (None keeps the weight's); differentiable in W.

    The weight is [R, ...]. u and v are constants: no gradient reaches them, and they must be as
    they are until the backward pass is done. `implementation` as in `kernels.dispatch`.

    Raises ValueError for vectors that do not fit the weight and for an empty one;
    ImplementationError for an implementation that cannot run.

    >>> weight, u_R, v_K = torch.randn(8, 3, 3, 4), torch.randn(8), torch.randn(36)
    >>> _ = kernels.power_iteration_([weight], [u_R], [v_K], num_iterations=50)
    >>> normalized = kernels.spectral_normalize(weight, u_R, v_K)
    >>> round(torch.linalg.matrix_norm(normalized.flatten(1), ord=2).item(), 1)
    1.0
    """
    check(weight, u_R, v_K)
    dtype = dtype or weight.dtype
    u_R, v_K = u_R.detach(), v_K.detach()
    implementation = SPECTRAL_NORMALIZE.choose(implementation, weight.device, weight.dtype)
    if implementation == REFERENCE:
        return spectral_normalize_reference(weight, u_R, v_K, dtype)
    y, _ = normalize_operator(
        weight.contiguous(), u_R.contiguous(), v_K.contiguous(), dtype, implementation
    )
    return y
