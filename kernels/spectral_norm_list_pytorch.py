"""W / σ of a list of weights, folded and cast, and its gradient: the closed form in PyTorch.

Operators of PyTorch throughout, weight by weight: differentiable, right in fp64.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.folding import Fold, fold, unfold


def normalize(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    folds: Sequence[Fold],
) -> tuple[list[Tensor], Tensor]:
    """(fold(W) / σ of every weight in its dtype, σ [L])."""
    sigmas = sigmas_of(weights, us, vs)
    kernels = [
        (fold(weight, how) / sigma).to(dtype)
        for weight, sigma, dtype, how in zip(weights, sigmas, dtypes, folds, strict=True)
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
    sigmas: Sequence[Tensor],
    folds: Sequence[Fold],
) -> list[Tensor]:
    """dW of every weight, from the gradients of its kernel."""
    dws = []
    for dy, weight, u_R, v_K, sigma, how in zip(dys, weights, us, vs, sigmas, folds, strict=True):
        d_normalized = unfold(dy.to(weight.dtype), how)
        inner = (d_normalized * weight).sum() / sigma
        outer = torch.outer(u_R, v_K).view(weight.shape)
        dws.append((d_normalized - inner * outer) / sigma)
    return dws
