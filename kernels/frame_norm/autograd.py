"""The registered operators of `kernels.frame_norm`, their gradients, and how they are called.

Equations and shapes as there: rows [B, T, S, C], statistics [T, C], gain and bias [B, t, C].
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels.common.collectives import num_ranks, sum_over
from kernels.frame_norm import cpu as frame_norm_cpu
from kernels.frame_norm import pytorch as frame_norm_pytorch
from kernels.frame_norm.operands import EPSILON, NormMethod, NormOperands
from kernels.frame_norm.pytorch import widened
from kernels.registration import operator

# -------------------------------------------------------------------- operators and fakes


def _passes(implementation: str) -> ModuleType:
    """The module with the four passes; Triton is imported when first used."""
    if implementation == "pytorch":
        return frame_norm_pytorch
    if implementation == "cpu":
        return frame_norm_cpu
    from kernels.frame_norm import triton as frame_norm_triton

    return frame_norm_triton


@operator("frame_moments")
def frame_moments(x_BTSC: Tensor, implementation: str) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, each [T, C]."""
    return _passes(implementation).moments(x_BTSC)


@torch.library.register_fake(frame_moments)
def _(x_BTSC: Tensor, implementation: str) -> tuple[Tensor, Tensor]:
    statistic = widened(x_BTSC.new_empty(x_BTSC.shape[1], x_BTSC.shape[3]))
    return statistic, torch.empty_like(statistic)


@operator("frame_norm")
def frame_normalize(
    x_BTSC: Tensor,
    gain_BtC: Tensor,
    bias_BtC: Tensor,
    mean_TC: Tensor,
    var_TC: Tensor,
    own_statistics: bool,
    group: str,
    implementation: str,
) -> Tensor:
    """y, of `NormOperands` and a `NormMethod`."""
    return _passes(implementation).normalize(
        NormOperands(x_BTSC, gain_BtC, bias_BtC, mean_TC, var_TC)
    )


@torch.library.register_fake(frame_normalize)
def _(x_BTSC: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(x_BTSC)


@operator("frame_norm_sums")
def frame_norm_sums(
    dy_BTSC: Tensor,
    x_BTSC: Tensor,
    gain_BtC: Tensor,
    bias_BtC: Tensor,
    mean_TC: Tensor,
    var_TC: Tensor,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """(S1, S2) as [2, B, T, C], and their sums over the batch weighted by the gain, [2, T, C]."""
    return _passes(implementation).sums(
        dy_BTSC, NormOperands(x_BTSC, gain_BtC, bias_BtC, mean_TC, var_TC)
    )


@torch.library.register_fake(frame_norm_sums)
def _(dy_BTSC: Tensor, x_BTSC: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    B, T, _, C = x_BTSC.shape
    return widened(x_BTSC.new_empty(2, B, T, C)), widened(x_BTSC.new_empty(2, T, C))


@operator("frame_norm_dx")
def frame_norm_dx(
    dy_BTSC: Tensor,
    x_BTSC: Tensor,
    gain_BtC: Tensor,
    bias_BtC: Tensor,
    mean_TC: Tensor,
    var_TC: Tensor,
    terms_2TC: Tensor | None,
    implementation: str,
) -> Tensor:
    """dx; `terms` are Σ_b gain·(S1, S2) / n, None where the statistics do not depend on x."""
    operands = NormOperands(x_BTSC, gain_BtC, bias_BtC, mean_TC, var_TC)
    return _passes(implementation).dx(dy_BTSC, operands, terms_2TC)


@torch.library.register_fake(frame_norm_dx)
def _(dy_BTSC: Tensor, x_BTSC: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(x_BTSC)


# Where autograd does not look, passes on a CPU need not be operators of their own, each of which
# costs 20 µs of Python and more. A compiler may see PyTorch's operators, but not the library's.


def _unregistered(implementation: str) -> ModuleType | None:
    """The passes where they need not be operators; None where they must."""
    if implementation == "pytorch" or (
        implementation == "cpu" and not torch.compiler.is_compiling()
    ):
        return _passes(implementation)
    return None


def untracked_moments(x_BTSC: Tensor, implementation: str) -> tuple[Tensor, Tensor]:
    """`frame_moments` without a gradient."""
    passes = _unregistered(implementation)
    return frame_moments(x_BTSC, implementation) if passes is None else passes.moments(x_BTSC)


def untracked_normalize(operands: NormOperands, method: NormMethod) -> Tensor:
    """`frame_normalize` without a gradient."""
    passes = _unregistered(method.implementation)
    if passes is None:
        return frame_normalize(*operands, *method)
    return passes.normalize(operands)


def _untracked_sums(
    dy_BTSC: Tensor, operands: NormOperands, implementation: str
) -> tuple[Tensor, Tensor]:
    """`frame_norm_sums`."""
    passes = _unregistered(implementation)
    if passes is None:
        return frame_norm_sums(dy_BTSC, *operands, implementation)
    return passes.sums(dy_BTSC, operands)


def _untracked_dx(
    dy_BTSC: Tensor, operands: NormOperands, terms_2TC: Tensor | None, implementation: str
) -> Tensor:
    """`frame_norm_dx`."""
    passes = _unregistered(implementation)
    if passes is None:
        return frame_norm_dx(dy_BTSC, *operands, terms_2TC, implementation)
    return passes.dx(dy_BTSC, operands, terms_2TC)


# ------------------------------------------------------------------------------- autograd


def _save_x(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[0])


def _moments_backward(ctx: Any, dmean_TC: Tensor, dvar_TC: Tensor) -> tuple[Tensor, None]:
    """Plain operators, which autograd differentiates again."""
    x_BTSC, mean_TC = ctx.saved_tensors
    centred = widened(x_BTSC) - mean_TC[:, None]
    count = x_BTSC.shape[0] * x_BTSC.shape[2]
    dx_BTSC = torch.addcmul(dmean_TC[:, None], centred, 2 * dvar_TC[:, None]) / count
    return dx_BTSC.to(x_BTSC.dtype), None


torch.library.register_autograd(frame_moments, _moments_backward, setup_context=_save_x)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.method = NormMethod(*inputs[5:])


def _normalize_backward(ctx: Any, dy_BTSC: Tensor) -> tuple[Tensor | None, ...]:
    operands, wanted = NormOperands(*ctx.saved_tensors), ctx.needs_input_grad[:5]
    if torch.is_grad_enabled():  # a graph of the backward pass is wanted
        found = _differentiable_gradients(dy_BTSC, operands, ctx.method, wanted)
    else:
        found = gradients(dy_BTSC, operands, ctx.method, wanted)
    return *found, None, None, None


def gradients(
    dy_BTSC: Tensor, operands: NormOperands, method: NormMethod, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Those of the operands that are wanted, in the closed form."""
    x, gain, bias, _, var = operands
    wants_x, *wants_rest = wanted
    dy_BTSC = dy_BTSC.contiguous()
    # Both halves in PyTorch share what they recompute.
    shared = (
        frame_norm_pytorch.passed(dy_BTSC, operands) if method.implementation == "pytorch" else None
    )
    grads: dict[str, Tensor] = {}
    terms = None
    if method.own_statistics or any(wants_rest):
        if shared:
            sums, weighted = shared.sums(gain)
        else:
            sums, weighted = _untracked_sums(dy_BTSC, operands, method.implementation)
            if gain.shape == bias.shape:  # both sums over time at once
                sums = sums.sum_to_size(2, *gain.shape)
        grads["bias"], grads["gain"] = (
            total.sum_to_size(scale.shape).to(scale.dtype)
            for total, scale in zip(sums, (bias, gain), strict=True)
        )
        if method.own_statistics:
            count = x.shape[0] * x.shape[2] * num_ranks(method.group)
            terms = sum_over(weighted, method.group) / count
        else:
            rstd = torch.rsqrt(var + EPSILON)
            grads["mean"], grads["var"] = -weighted[0] * rstd, -0.5 * weighted[1] * rstd.square()
    if wants_x and shared:
        grads["x"] = shared.dx_(terms).to(x.dtype)
    elif wants_x:
        grads["x"] = _untracked_dx(dy_BTSC, operands, terms, method.implementation)
    return [grads.get(name) for name in ("x", "gain", "bias", "mean", "var")]


def _differentiable_gradients(
    dy_BTSC: Tensor, operands: NormOperands, method: NormMethod, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The reference's, which have derivatives."""
    y_BTSC = frame_norm_pytorch.normalize(with_own_statistics(operands, method))
    places = [i for i, wants in enumerate(wanted) if wants]
    grads = torch.autograd.grad(
        y_BTSC, [operands[i] for i in places], dy_BTSC, create_graph=True, allow_unused=True
    )
    found = dict(zip(places, grads, strict=True))
    return [found.get(i) for i in range(5)]


def with_own_statistics(operands: NormOperands, method: NormMethod) -> NormOperands:
    """The operands, mean and variance as functions of x where they are x's own."""
    if not method.own_statistics:
        return operands
    mean_TC, var_TC = frame_norm_pytorch.moments(operands.x_BTSC, method.group)
    return operands._replace(mean_TC=mean_TC, var_TC=var_TC)


torch.library.register_autograd(frame_normalize, _normalize_backward, setup_context=_save_inputs)
