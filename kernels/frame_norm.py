"""Per-frame conditional batch norm with ReLU.

x̂[b,t,c] = (x[b,t,c] - mean[t,c]) / sqrt(var[t,c] + eps)
y[b,t,c] = relu(gain[b,c] · x̂[b,t,c] + bias[b,c]) [+ residual[b,t,c]]

SSW-GAN (as DVD-GAN): every time step has its own mean and (biased) variance, taken
over batch and space; there is no running average. For inference the statistics are given.

With g = dy where relu was open (else 0), n = B·H·W, and sums over one frame's pixels,

S1[b,t,c] = Σ g    S2[b,t,c] = Σ g·x̂    dbias = S1    dgain = S2    (summed over t for [B, C])
dx = (gain·g - Σ_b gain·S1 / n - x̂ · Σ_b gain·S2 / n) / sqrt(var + eps)

and with given statistics dx = gain·g / sqrt(var + eps), dmean = -Σ_b gain·S1 / sqrt(var + eps),
dvar = -Σ_b gain·S2 / (2 (var + eps)). Only x and the statistics are kept for the backward pass;
the residual's gradient is dy.

Shapes: B batch, T frames, C channels, H x W pixels, S = H·W; statistics [T, C], gain and bias
[B, C] or [B, T, C] (t is 1 or T). Statistics and arithmetic are fp32 (fp64 for fp64 input)
whatever x is: in bf16, x² would keep eight bits. Least bytes, of x: forward it is read for the
statistics, read again and written (three times; 6 bytes per element in bf16); backward x and dy
are read for the sums, read again and dx is written (five times; 10 bytes). 8 + 14 FLOPs.

Implementations: "triton" (fp32, fp16, bf16), "pytorch" (the same passes in PyTorch operators, on
any device), "reference". Derivatives of order two and higher are the reference's in all of them.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from kernels import frame_norm_pytorch
from kernels.collectives import group_name, num_ranks, sum_over
from kernels.frame_norm_pytorch import widened
from kernels.implementation import (
    REFERENCE,
    Implementation,
    Operator,
    everywhere,
    triton_obstacle,
    triton_reluctance,
)
from kernels.layout import channels_last

EPSILON = 1e-4  # BigGAN's, whose networks the paper builds on

OPERATOR = Operator(
    "frame_norm",
    Implementation("triton", triton_obstacle, triton_reluctance),
    Implementation("pytorch", everywhere),
)

# -------------------------------------------------------------------- operators and fakes


def _passes(impl: str) -> ModuleType:
    """The module with the four passes; Triton is imported when first used."""
    if impl == "pytorch":
        return frame_norm_pytorch
    from kernels import frame_norm_triton

    return frame_norm_triton


@torch.library.custom_op("sswgan::frame_moments", mutates_args=())
def frame_moments(x_BTSC: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, each [T, C]."""
    return _passes(impl).moments(x_BTSC)


@frame_moments.register_fake
def _(x_BTSC: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    statistic = widened(x_BTSC.new_empty(x_BTSC.shape[1], x_BTSC.shape[3]))
    return statistic, torch.empty_like(statistic)


@torch.library.custom_op("sswgan::frame_norm", mutates_args=())
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


@frame_normalize.register_fake
def _(x_BTSC: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(x_BTSC)


@torch.library.custom_op("sswgan::frame_norm_sums", mutates_args=())
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


@frame_norm_sums.register_fake
def _(dy_BTSC: Tensor, x_BTSC: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    B, T, _, C = x_BTSC.shape
    return widened(x_BTSC.new_empty(2, B, T, C)), widened(x_BTSC.new_empty(2, T, C))


@torch.library.custom_op("sswgan::frame_norm_dx", mutates_args=())
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


@frame_norm_dx.register_fake
def _(dy_BTSC: Tensor, x_BTSC: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(x_BTSC)


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


frame_moments.register_autograd(_moments_backward, setup_context=_save_x)


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
    dy_BTSC: Tensor, tensors: Sequence[Tensor], form: "Form", wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Those of `tensors` = (x, gain, bias, mean, var) that are wanted, in the closed form."""
    x, gain, bias, mean, var = tensors
    wants_x, wants_gain, wants_bias, wants_mean, wants_var = wanted
    dy_BTSC = dy_BTSC.contiguous()
    arguments = dy_BTSC, x, gain, bias, mean, var
    grads: dict[str, Tensor] = {}
    terms = None
    if form.own_statistics or wants_gain or wants_bias or wants_mean or wants_var:
        sums, weighted = frame_norm_sums(*arguments, form.eps, form.relu, form.impl)
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
        grads["x"] = frame_norm_dx(*arguments, terms, form.eps, form.relu, form.impl)
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


def with_own_statistics(tensors: Sequence[Tensor], form: "Form") -> Sequence[Tensor]:
    """(x, gain, bias, mean, var), the last two as functions of x where they are x's own."""
    if not form.own_statistics:
        return tensors
    return *tensors[:3], *frame_norm_pytorch.moments(tensors[0], form.group)


frame_normalize.register_autograd(_normalize_backward, setup_context=_save_inputs)


# ------------------------------------------------------------------------ public functions


def frame_statistics(x_BTCHW: Tensor, *, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every (time step, channel), each [T, C], differentiable.

    fp32, and fp64 for fp64. `impl` as in `kernels.implementation`. Raises ValueError for an empty
    video, ImplementationError for an implementation that cannot run.
    """
    x_BTSC = rows(x_BTCHW)
    _require_values(x_BTCHW)
    impl = OPERATOR.choose(impl, x_BTCHW.device, x_BTCHW.dtype)
    return frame_norm_pytorch.moments(x_BTSC) if impl == REFERENCE else frame_moments(x_BTSC, impl)


def frame_norm(
    x_BTCHW: Tensor,
    gain: Tensor,
    bias: Tensor,
    *,
    relu: bool = True,
    eps: float = EPSILON,
    residual: Tensor | None = None,
    statistics: tuple[Tensor, Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
    impl: str | None = None,
) -> Tensor:
    """Normalise per (time step, channel), scale and shift; same shape and dtype as x.

    `gain` and `bias` are [B, C], or [B, T, C] to differ between frames. `residual`, of the shape
    and dtype of x, is added after the ReLU. `statistics` = (mean_TC, var_TC) replaces the batch's
    own: gradients reach them if they require some, and pass through them to x only if they were
    computed from x. With `group` the batch's own are those of all its ranks together, which must
    hold batches of one size: an all-reduce of [T, C, 2] forward and one backward. `impl` as in
    `kernels.implementation`.

    Raises ValueError for shapes that do not fit, an empty video without `statistics`, and
    `statistics` together with `group`; ImplementationError for an implementation that cannot run.
    """
    _check(x_BTCHW, gain, bias, residual, statistics)
    tensors, form = prepare(x_BTCHW, gain, bias, relu, eps, statistics, group, impl)
    return apply(tensors, form, x_BTCHW.shape[3:], residual)


def apply(
    tensors: "Tensors", form: "Form", size: tuple[int, ...], residual: Tensor | None = None
) -> Tensor:
    """y of H x W = `size`, of what `prepare` made."""
    residual_BTSC = None if residual is None else rows(residual)
    if form.impl == REFERENCE:
        y_BTSC = differentiable(tensors, form, residual_BTSC)
    else:
        y_BTSC = frame_normalize(*tensors, residual_BTSC, *form)
    return y_BTSC.unflatten(2, size).permute(0, 1, 4, 2, 3)


class Form(NamedTuple):
    """How a norm is computed, as `frame_normalize` takes it."""

    eps: float
    relu: bool
    own_statistics: bool
    group: str
    impl: str


Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def prepare(
    x_BTCHW: Tensor,
    gain: Tensor,
    bias: Tensor,
    relu: bool,
    eps: float,
    statistics: tuple[Tensor, Tensor] | None,
    group: dist.ProcessGroup | None,
    impl: str | None,
    moments: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensors, Form]:
    """Arguments of `frame_normalize`: (x, gain, bias, mean, var) and the form. As `frame_norm`;
    `moments`, mean and variance of x by whoever made x, saves taking them."""
    if statistics is None:
        _require_values(x_BTCHW)
    elif group is not None:
        raise ValueError("given statistics are not synchronised: pass either them or a group")
    impl = OPERATOR.choose(impl, x_BTCHW.device, x_BTCHW.dtype) if x_BTCHW.numel() else REFERENCE
    form = Form(eps, relu, statistics is None, group_name(group), impl)
    x_BTSC = rows(x_BTCHW)
    gain_BtC, bias_BtC = (v[:, None] if v.dim() == 2 else v for v in (gain, bias))
    if statistics is not None:
        dtype = torch.promote_types(x_BTCHW.dtype, torch.float32)
        mean_TC, var_TC = (v.to(dtype).contiguous() for v in statistics)
    elif impl == REFERENCE:
        mean_TC, var_TC = frame_norm_pytorch.moments(x_BTSC, form.group)
    else:
        with torch.no_grad():  # frame_normalize takes the gradient through them as well
            mean_TC, var_TC = moments or frame_moments(x_BTSC, impl)
            mean_TC, var_TC = _synchronized(mean_TC, var_TC, form.group)
    return (x_BTSC, gain_BtC.contiguous(), bias_BtC.contiguous(), mean_TC, var_TC), form


def differentiable(
    tensors: Sequence[Tensor], form: Form, residual_BTSC: Tensor | None = None
) -> Tensor:
    """y in plain operators, with derivatives of any order, of what `prepare` made."""
    x, gain, bias, mean, var = tensors
    return frame_norm_pytorch.normalize(
        x, gain, bias, mean, var, residual_BTSC, form.eps, form.relu
    )


def _synchronized(mean_TC: Tensor, var_TC: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """The group's mean and variance from every rank's, in one all-reduce.

    fp64, because E[x²] - E[x]² cancels.
    """
    if not group:
        return mean_TC, var_TC
    mean = mean_TC.double()
    moments = sum_over(torch.stack([mean, var_TC + mean.square()]), group)
    mean, second = moments / num_ranks(group)
    return mean.to(mean_TC.dtype), (second - mean.square()).clamp_min(0).to(var_TC.dtype)


def rows(x_BTCHW: Tensor) -> Tensor:
    """[B, T, C, H, W] → contiguous [B, T, S, C]; copies only what is not channels last."""
    return channels_last(x_BTCHW).permute(0, 1, 3, 4, 2).flatten(2, 3)


def _require_values(x_BTCHW: Tensor) -> None:
    if x_BTCHW.numel() == 0:
        raise ValueError(f"an empty video {tuple(x_BTCHW.shape)} has no statistics")


def _check(
    x_BTCHW: Tensor,
    gain: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    statistics: tuple[Tensor, Tensor] | None,
) -> None:
    if x_BTCHW.dim() != 5:
        raise ValueError(f"x must be [B, T, C, H, W], not {tuple(x_BTCHW.shape)}")
    B, T, C = x_BTCHW.shape[:3]
    for name, scale in (("gain", gain), ("bias", bias)):
        if tuple(scale.shape) not in ((B, C), (B, T, C)):
            expected = f"[{B}, {C}] or [{B}, {T}, {C}]"
            raise ValueError(f"{name} must be {expected}, not {tuple(scale.shape)}")
    if residual is not None and residual.shape != x_BTCHW.shape:
        raise ValueError(
            f"residual must be as x, {tuple(x_BTCHW.shape)}, not {tuple(residual.shape)}"
        )
    for name, value in zip(("mean", "var"), statistics or (), strict=False):
        if tuple(value.shape) != (T, C):
            raise ValueError(f"{name} must be [{T}, {C}], not {tuple(value.shape)}")
