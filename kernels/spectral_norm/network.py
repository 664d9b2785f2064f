"""W / σ of all weights of a network at once, with the resampling folded in and the cast.

K_i = fold_i(W_i / σ_i),  σ = uᵀ W v,   in the dtype that each weight's layer computes in.

Equations as in `kernels.spectral_norm`, the fold as in `kernels.convolution.folding`. Folding is
linear, so 1/σ commutes with it. The gradient, with u and v constant, in closed form:
dŴ = unfold(dK),  dW = (dŴ - ⟨dŴ, Ŵ⟩ u vᵀ) / σ. Derivatives of order two and higher are those of the
same formula in PyTorch. Kept for the backward pass: W, u, v and σ, of which only σ is not there
already. K is rounded once, from the fp32 sum of the taps.

Shapes: W [R, ...] read as [R, K] by u [R] and v [K]; with a fold [O, taps..., I]; L weights.
Arithmetic is fp32 (the weight's own precision in "pytorch" and "reference"). Bytes for N values in
bf16: forward 10·N, backward 12·N. W is read for σ and again to be divided, from memory both times,
since the network lies between; weight by weight it is 6·N and 10·N if W stays in the L2 cache,
but two launches for each. FLOPs 4·N and 6·N.

Implementations: "triton" (two launches forward and two backward, for fp32 weights), "pytorch" (the
closed form in few calls), "reference". Decided: unlike the power iteration it is not in CUDA C++
too. It is elementwise but for one sum per weight, in as few launches either way; a GPU's timing
may say otherwise.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.convolution.folding import FOLDS, Fold, check_fold, fold, folded_shape
from kernels.dispatch import (
    REFERENCE,
    Implementation,
    Operator,
    everywhere,
    triton_not_preferred,
)
from kernels.registration import operator
from kernels.spectral_norm import network_pytorch
from kernels.spectral_norm.arguments import check_lists, fp32_triton_unsupported
from kernels.spectral_norm.weight import spectral_normalize_reference

SPECTRAL_NORMALIZE_ALL = Operator(
    "spectral_normalize_all",
    Implementation("triton", fp32_triton_unsupported, triton_not_preferred),
    Implementation("pytorch", everywhere),
)
LOW = (torch.float16, torch.bfloat16)


def spectral_normalize_all_reference(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    folds: Sequence[Fold],
) -> list[Tensor]:
    """One after the other, differentiable in the weights."""
    return [
        fold(spectral_normalize_reference(weight, u_R, v_K, weight.dtype), how).to(dtype)
        for weight, u_R, v_K, dtype, how in zip(weights, us, vs, dtypes, folds, strict=True)
    ]


# -------------------------------------------------------------------- operators and fakes


# An operator takes lists of numbers, not of dtypes or folds: `lows` says which kernels are of
# the dtype, the others being of the weights' own, and `folds` which of FOLDS each has.
@operator("spectral_normalize_all")
def normalize_all_operator(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    dtype: torch.dtype,
    lows: Sequence[bool],
    folds: Sequence[int],
) -> tuple[list[Tensor], Tensor]:
    """(K of every weight, σ [L])."""
    from kernels.spectral_norm import network_triton

    dtypes, hows = _dtypes(weights, dtype, lows), [FOLDS[index] for index in folds]
    return network_triton.normalize(weights, us, vs, dtypes, hows)


@torch.library.register_fake(normalize_all_operator)
def _(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    dtype: torch.dtype,
    lows: Sequence[bool],
    folds: Sequence[int],
) -> tuple[list[Tensor], Tensor]:
    dtypes = _dtypes(weights, dtype, lows)
    kernels = [
        weight.new_empty(folded_shape(tuple(weight.shape), FOLDS[index]), dtype=own)
        for weight, own, index in zip(weights, dtypes, folds, strict=True)
    ]
    return kernels, weights[0].new_empty(len(weights))


def _dtypes(
    weights: Sequence[Tensor], dtype: torch.dtype, lows: Sequence[bool]
) -> list[torch.dtype]:
    return [dtype if low else weight.dtype for weight, low in zip(weights, lows, strict=True)]


@operator("spectral_normalize_all_dw")
def gradients_operator(
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    sigma_L: Tensor,
    folds: Sequence[int],
) -> list[Tensor]:
    """dW of every weight, from dK."""
    from kernels.spectral_norm import network_triton

    hows = [FOLDS[index] for index in folds]
    return network_triton.gradients(dys, weights, us, vs, sigma_L, hows)


@torch.library.register_fake(gradients_operator)
def _(dys: Sequence[Tensor], weights: Sequence[Tensor], *arguments: Any) -> list[Tensor]:
    return [torch.empty_like(weight) for weight in weights]


# ------------------------------------------------------------------------------- autograd


class _Method(NamedTuple):
    """What is the same for a network's every pass."""

    dtype: torch.dtype
    lows: tuple[bool, ...]
    folds: tuple[int, ...]
    implementation: str


def _forward(method: _Method, *tensors: Tensor) -> tuple[list[Tensor], Tensor]:
    """(K of every weight, σ [L]) without derivatives, of all weights, then all u, then all v."""
    weights, us, vs = _thirds(tensors)
    if method.implementation == "triton":
        return normalize_all_operator(weights, us, vs, method.dtype, method.lows, method.folds)
    dtypes, hows = _dtypes(weights, method.dtype, method.lows), [FOLDS[i] for i in method.folds]
    return network_pytorch.normalize(weights, us, vs, dtypes, hows)


class _NormalizeAll(torch.autograd.Function):
    """Not the operator's own: a registered one handles hundreds of tensors in a millisecond more.

    The weights as they are, as in `spectral_normalize`.
    """

    @staticmethod
    def forward(ctx: Any, method: _Method, *tensors: Tensor) -> tuple[Tensor, ...]:
        kernels, sigma_L = _forward(method, *tensors)
        ctx.method = method
        ctx.save_for_backward(*tensors, sigma_L)
        return tuple(kernels)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, sigma_L = ctx.saved_tensors
        method: _Method = ctx.method
        weights, us, vs = _thirds(tensors)
        dws: Sequence[Tensor]
        if method.implementation == "triton" and not torch.is_grad_enabled():
            dys = tuple(dy.contiguous() for dy in dys)
            dws = gradients_operator(dys, weights, us, vs, sigma_L, method.folds)
        else:
            if torch.is_grad_enabled():  # a graph of the backward pass is wanted: σ a function of W
                sigma_L = torch.stack(network_pytorch.sigmas_of(weights, us, vs))
            hows = [FOLDS[index] for index in method.folds]
            dws = network_pytorch.gradients(dys, weights, us, vs, sigma_L, hows)
        return None, *dws, *[None] * (2 * len(weights))


def _thirds(
    tensors: Sequence[Tensor],
) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    count = len(tensors) // 3
    return tensors[:count], tensors[count : 2 * count], tensors[2 * count :]


# ------------------------------------------------------------------------ public function


def spectral_normalize_all(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    dtypes: Sequence[torch.dtype | None],
    folds: Sequence[Fold],
    *,
    implementation: str | None = None,
) -> list[Tensor]:
    """fold(W / (uᵀ W v)) of every weight, cast; differentiable in the weights.

    All weights in one call, of any number and any shapes [R, ...] of one dtype on one device.
    `dtypes` has one for each, None for the weight's own; besides it they may be of one dtype of 16
    bits. `folds` has None, "upsampling" ([O, 3, 3, I] → [O, 4, 4, I]) or the pooling that follows:
    (2, 2) for [O, h, w, I], (1, 2, 2) or (2, 2, 2) for [O, t, h, w, I].

    u and v are constants, and must be as they are until the backward pass is done. Gradients of
    all weights come at once, when those of all kernels are there. Runs are bit-equal.
    `implementation` as in `kernels.dispatch`.

    Raises ValueError for lists that do not fit, an empty list or weight, and dtypes and folds that
    cannot be; ImplementationError for an implementation that cannot run.

    >>> weights = [torch.randn(8, 3, 3, 4), torch.randn(6, 5)]
    >>> us, vs = [torch.randn(8), torch.randn(6)], [torch.randn(36), torch.randn(5)]
    >>> _ = kernels.power_iteration_(weights, us, vs)
    >>> folded, plain = kernels.spectral_normalize_all(
    ...     weights, us, vs, [None, torch.bfloat16], ["upsampling", None]
    ... )
    >>> folded.shape, plain.dtype
    (torch.Size([8, 4, 4, 4]), torch.bfloat16)
    """
    check_lists(weights, us, vs)
    if not len(weights) == len(dtypes) == len(folds):
        raise ValueError(f"{len(weights)} weights, {len(dtypes)} dtypes and {len(folds)} folds")
    for weight, how in zip(weights, folds, strict=True):
        check_fold(tuple(weight.shape), how)
    own = weights[0].dtype
    wanted = [dtype or own for dtype in dtypes]
    others = set(wanted) - {own}
    if len(others) > 1 or not others <= set(LOW):
        names = ", ".join(sorted(map(str, others)))
        raise ValueError(f"kernels are of their weights' {own} and one 16-bit dtype, not {names}")

    us, vs = ([v.detach() if v.requires_grad else v for v in vectors] for vectors in (us, vs))
    implementation = SPECTRAL_NORMALIZE_ALL.choose(implementation, weights[0].device, own)
    if implementation == REFERENCE:
        return spectral_normalize_all_reference(weights, us, vs, wanted, folds)
    method = _Method(
        next(iter(others), own),
        tuple(dtype != own for dtype in wanted),
        tuple(FOLDS.index(how) for how in folds),
        implementation,
    )
    tensors = *(weight.contiguous() for weight in weights), *us, *vs
    if torch.is_grad_enabled():
        return list(_NormalizeAll.apply(method, *tensors))
    return _forward(method, *tensors)[0]
