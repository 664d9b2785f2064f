"""The registered operators of `kernels.frame_norm`, their gradients, and how they are called.

Equations and shapes as there: rows [B, T, S, C], statistics [T, C], gain and bias [B, t, C].
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.common.collectives import num_ranks, sum_over
from kernels.frame_norm import cpu as frame_norm_cpu
from kernels.frame_norm import pytorch as frame_norm_pytorch
from kernels.frame_norm.pytorch import widened
from kernels.registration import operator


class Form(NamedTuple):
    """How a norm is computed, as `frame_normalize` takes it."""

    eps: float
    relu: bool
    own_statistics: bool
    group: str
    impl: str


Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def differentiable(
    tensors: Sequence[Tensor], form: Form, residual_BTSC: Tensor | None = None
) -> Tensor:
    """y in plain operators, with derivatives of any order, of what `prepare` made."""
    x, gain, bias, mean, var = tensors
    return frame_norm_pytorch.normalize(
        x, gain, bias, mean, var, residual_BTSC, form.eps, form.relu
    )


# -------------------------------------------------------------------- operators and fakes


def _passes(impl: str) -> ModuleType:
    """The module with the four passes; Triton is imported when first used."""
    if impl == "pytorch":
        return frame_norm_pytorch
    if impl == "cpu":
        return frame_norm_cpu
    from kernels.frame_norm import triton as frame_norm_triton

    return frame_norm_triton


@operator("frame_moments")
def frame_moments(x_BTSC: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, each [T, C]."""
    return _passes(impl).moments(x_BTSC)


@torch.library.register_fake(frame_moments)
def _(x_BTSC: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    statistic = widened(x_BTSC.new_empty(x_BTSC.shape[1], x_BTSC.shape[3]))
    return statistic, torch.empty_like(statistic)


@operator("frame_norm")
def frame_normalize(
    x_BTSC: Tensor,
    gain_BtC: Tensor,
    bias_BtC: Tensor,
    mean_TC: Tensor,
    var_TC: Tensor,
    residual_BTSC: Tensor | None,
    eps: float,
    relu: bool,
    own_statistics: bool,
    group: str,
    impl: str,
) -> Tensor:
    """y. `own_statistics` (of x, over `group` if any) says only how the gradient is to be taken."""
    return _passes(impl).normalize(
        x_BTSC, gain_BtC, bias_BtC, mean_TC, var_TC, residual_BTSC, eps, relu
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
    eps: float,
    relu: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """(S1, S2) as [2, B, T, C], and their sums over the batch weighted by the gain, [2, T, C]."""
    return _passes(impl).sums(dy_BTSC, x_BTSC, gain_BtC, bias_BtC, mean_TC, var_TC, eps, relu)


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
    eps: float,
    relu: bool,
    impl: str,
) -> Tensor:
    """dx; `terms` are Σ_b gain·(S1, S2) / n, None where the statistics do not depend on x."""
    return _passes(impl).dx(
        dy_BTSC, x_BTSC, gain_BtC, bias_BtC, mean_TC, var_TC, terms_2TC, eps, relu
    )


@torch.library.register_fake(frame_norm_dx)
def _(dy_BTSC: Tensor, x_BTSC: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(x_BTSC)


# Where autograd does not look, passes on a CPU need not be operators of their own, each of which
# costs 20 µs of Python and more. A compiler may see PyTorch's operators, but not the library's.


def _unregistered(impl: str) -> ModuleType | None:
    """The passes where they need not be operators; None where they must."""
    if impl == "pytorch" or (impl == "cpu" and not torch.compiler.is_compiling()):
        return _passes(impl)
    return None


def untracked_moments(x_BTSC: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """`frame_moments` without a gradient."""
    passes = _unregistered(impl)
    return frame_moments(x_BTSC, impl) if passes is None else passes.moments(x_BTSC)


def untracked_normalize(
    tensors: Sequence[Tensor], form: Form, residual_BTSC: Tensor | None = None
) -> Tensor:
    """`frame_normalize` without a gradient."""
    passes = _unregistered(form.impl)
    if passes is None:
        return frame_normalize(*tensors, residual_BTSC, *form)
    return passes.normalize(*tensors, residual_BTSC, form.eps, form.relu)


def _untracked_sums(arguments: Sequence[Tensor], form: Form) -> tuple[Tensor, Tensor]:
    """`frame_norm_sums`."""
    passes = _unregistered(form.impl)
    if passes is None:
        return frame_norm_sums(*arguments, form.eps, form.relu, form.impl)
    return passes.sums(*arguments, form.eps, form.relu)


def _untracked_dx(arguments: Sequence[Tensor], terms_2TC: Tensor | None, form: Form) -> Tensor:
    """`frame_norm_dx`."""
    passes = _unregistered(form.impl)
    if passes is None:
        return frame_norm_dx(*arguments, terms_2TC, form.eps, form.relu, form.impl)
    return passes.dx(*arguments, terms_2TC, form.eps, form.relu)


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
    *tensors, residual, ctx.eps, ctx.relu, ctx.own_statistics, ctx.group, ctx.impl = inputs
    ctx.save_for_backward(*tensors)
    ctx.residual_dtype = None if residual is None else residual.dtype


def _normalize_backward(ctx: Any, dy_BTSC: Tensor) -> tuple[Tensor | None, ...]:
    dresidual = None if ctx.residual_dtype is None else dy_BTSC.to(ctx.residual_dtype)
    rest = dresidual, None, None, None, None, None
    if torch.is_grad_enabled():  # a graph of the backward pass is wanted
        return *_differentiable_gradients(ctx, dy_BTSC), *rest
    form = Form(ctx.eps, ctx.relu, ctx.own_statistics, ctx.group, ctx.impl)
    return *gradients(dy_BTSC, ctx.saved_tensors, form, ctx.needs_input_grad[:5]), *rest


def gradients(
    dy_BTSC: Tensor, tensors: Sequence[Tensor], form: Form, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Those of `tensors` = (x, gain, bias, mean, var) that are wanted, in the closed form."""
    x, gain, bias, mean, var = tensors
    wants_x, wants_gain, wants_bias, wants_mean, wants_var = wanted
    dy_BTSC = dy_BTSC.contiguous()
    arguments = dy_BTSC, x, gain, bias, mean, var
    # Both halves in PyTorch share what they recompute.
    shared = None
    if form.impl == "pytorch":
        shared = frame_norm_pytorch.passed(*arguments, form.eps, form.relu)
    grads: dict[str, Tensor] = {}
    terms = None
    if form.own_statistics or wants_gain or wants_bias or wants_mean or wants_var:
        if shared:
            sums, weighted = shared.sums(gain)
        else:
            sums, weighted = _untracked_sums(arguments, form)
            if gain.shape == bias.shape:  # both sums over time at once
                sums = sums.sum_to_size(2, *gain.shape)
        grads["bias"], grads["gain"] = (
            total.sum_to_size(scale.shape).to(scale.dtype)
            for total, scale in zip(sums, (bias, gain), strict=True)
        )
        if form.own_statistics:
            count = x.shape[0] * x.shape[2] * num_ranks(form.group)
            terms = sum_over(weighted, form.group) / count
        else:
            rstd = torch.rsqrt(var + form.eps)
            grads["mean"], grads["var"] = -weighted[0] * rstd, -0.5 * weighted[1] * rstd.square()
    if wants_x:
        grads["x"] = (
            shared.dx_(terms).to(x.dtype) if shared else _untracked_dx(arguments, terms, form)
        )
    return [grads.get(name) for name in ("x", "gain", "bias", "mean", "var")]


def _differentiable_gradients(ctx: Any, dy_BTSC: Tensor) -> list[Tensor | None]:
    """The gradients of all but the residual as the reference's, which have derivatives."""
    tensors = ctx.saved_tensors
    form = Form(ctx.eps, ctx.relu, ctx.own_statistics, ctx.group, ctx.impl)
    y_BTSC = differentiable(with_own_statistics(tensors, form), form)
    wanted = [i for i, wants in enumerate(ctx.needs_input_grad[:5]) if wants]
    grads = torch.autograd.grad(
        y_BTSC, [tensors[i] for i in wanted], dy_BTSC, create_graph=True, allow_unused=True
    )
    found = dict(zip(wanted, grads, strict=True))
    return [found.get(i) for i in range(5)]


def with_own_statistics(tensors: Sequence[Tensor], form: Form) -> Sequence[Tensor]:
    """(x, gain, bias, mean, var), the last two as functions of x where they are x's own."""
    if not form.own_statistics:
        return tensors
    return *tensors[:3], *frame_norm_pytorch.moments(tensors[0], form.group)


torch.library.register_autograd(frame_normalize, _normalize_backward, setup_context=_save_inputs)
