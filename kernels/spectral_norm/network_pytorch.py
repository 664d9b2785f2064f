"""W / σ of a list of weights, folded and cast, and its gradient: the closed form in PyTorch.

Operators of PyTorch throughout: differentiable, right in fp64.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.convolution.folding import Fold, fold, unfold


def normalize(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    folds: Sequence[Fold],
) -> tuple[list[Tensor], Tensor]:
    """(fold(W) / σ of every weight in its dtype, σ [L])."""
    sigmas = sigmas_of(weights, us, vs)
    divided = [
        fold(weight, how) / sigma for weight, sigma, how in zip(weights, sigmas, folds, strict=True)
    ]
    # Not `to` where it does nothing: torch 2.11's compiler gives the inputs of an autograd Function
    # a gradient of zero where an operator gave back the very result that it was given.
    kernels = [
        kernel if kernel.dtype == dtype else kernel.to(dtype)
        for kernel, dtype in zip(divided, dtypes, strict=True)
    ]
    return kernels, torch.stack(sigmas)


def sigmas_of(
    weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor]
) -> list[Tensor]:
    """uᵀWv of every weight."""
    return [
        torch.dot(u_R, weight.flatten(1).mv(v_K))
        for weight, u_R, v_K in zip(weights, us, vs, strict=True)
    ]


def gradients(
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    sigma_L: Tensor,
    folds: Sequence[Fold],
) -> list[Tensor]:
    """dW of every weight, from the gradients of its kernel."""
    # On a CPU the number of calls is the time: one for all of them where there is one.
    ds = [
        unfold(dy.to(weight.dtype), how).flatten()
        for dy, weight, how in zip(dys, weights, folds, strict=True)
    ]
    inner = [torch.dot(d, weight.flatten()) for d, weight in zip(ds, weights, strict=True)]
    scaled = torch._foreach_mul(list(vs), torch.stack(inner).div(sigma_L).neg().unbind())
    products = [
        torch.addr(d.view(len(u_R), -1), u_R, v_K)
        for d, u_R, v_K in zip(ds, us, scaled, strict=True)
    ]
    sigmas = sigma_L.unbind()
    if torch.is_grad_enabled():
        products = list(torch._foreach_div(products, sigmas))
    else:
        torch._foreach_div_(products, sigmas)
    return [dw.view_as(weight) for dw, weight in zip(products, weights, strict=True)]
