"""Per-frame conditional batch norm with ReLU.

x̂[b,t,c] = (x[b,t,c] - mean[t,c]) / sqrt(var[t,c] + eps)
y[b,t,c] = relu(gain[b,c] · x̂[b,t,c] + bias[b,c])

SSW-GAN (as DVD-GAN): every time step has its own mean and (biased) variance, taken
over batch and space; there is no running average. For inference the statistics are given.

With g = dy where relu was open (else 0), n = B·H·W, and sums over one frame's pixels,

S1[b,t,c] = Σ g    S2[b,t,c] = Σ g·x̂    dbias = S1    dgain = S2    (summed over t for [B, C])
dx = (gain·g - Σ_b gain·S1 / n - x̂ · Σ_b gain·S2 / n) / sqrt(var + eps)

and with given statistics dx = gain·g / sqrt(var + eps), dmean = -Σ_b gain·S1 / sqrt(var + eps),
dvar = -Σ_b gain·S2 / (2 (var + eps)). Only x and the statistics are kept for the backward pass.

Shapes: B batch, T frames, C channels, H x W pixels, S = H·W; statistics [T, C], gain and bias
[B, C] or [B, T, C] (t is 1 or T). Statistics and arithmetic are fp32 (fp64 for fp64 input)
whatever x is: in bf16, x² would keep eight bits. Least bytes, of x: forward it is read for the
statistics, read again and written (three times; 6 bytes per element in bf16); backward x and dy
are read for the sums, read again and dx is written (five times; 10 bytes). 8 + 14 FLOPs.

Implementations: "triton" (fp32, fp16, bf16), "cpu" (C++, the same dtypes), "pytorch" (the same
passes in PyTorch operators, on any device), "reference". Derivatives of order two and higher are
the reference's in all of them.
"""

import torch
from torch import Tensor
from torch import distributed as dist

from kernels.common.collectives import group_name, num_ranks, sum_over
from kernels.common.layout import channels_last
from kernels.dispatch import (
    REFERENCE,
    Implementation,
    Operator,
    everywhere,
    triton_not_preferred,
    triton_unsupported,
)
from kernels.frame_norm import cpu as frame_norm_cpu
from kernels.frame_norm import pytorch as frame_norm_pytorch
from kernels.frame_norm.autograd import (
    frame_moments,
    frame_normalize,
    untracked_moments,
    untracked_normalize,
)
from kernels.frame_norm.operands import EPSILON, NormMethod, NormOperands

__all__ = ["EPSILON", "frame_norm", "frame_statistics"]

OPERATOR = Operator(
    "frame_norm",
    Implementation("triton", triton_unsupported, triton_not_preferred),
    Implementation("cpu", frame_norm_cpu.unsupported, frame_norm_cpu.not_preferred),
    Implementation("pytorch", everywhere),
)


def frame_statistics(
    x_BTCHW: Tensor, *, implementation: str | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every (time step, channel), each [T, C], differentiable.

    fp32, and fp64 for fp64. `implementation` as in `kernels.dispatch`. Raises ValueError for an
    empty video, ImplementationError for an implementation that cannot run.

    >>> mean_TC, var_TC = kernels.frame_statistics(torch.randn(2, 3, 8, 4, 4))
    >>> mean_TC.shape
    torch.Size([3, 8])
    """
    x_BTSC = rows(x_BTCHW)
    _require_values(x_BTCHW)
    implementation = OPERATOR.choose(implementation, x_BTCHW.device, x_BTCHW.dtype)
    return (
        frame_norm_pytorch.moments(x_BTSC)
        if implementation == REFERENCE
        else frame_moments(x_BTSC, implementation)
    )


def frame_norm(
    x_BTCHW: Tensor,
    gain: Tensor,
    bias: Tensor,
    *,
    statistics: tuple[Tensor, Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Normalise per (time step, channel), scale, shift, ReLU; same shape and dtype as x.

    `gain` and `bias` are [B, C], or [B, T, C] to differ between frames. `statistics` = (mean_TC,
    var_TC) replaces the batch's own: gradients reach them if they require some, and pass through
    them to x only if they were computed from x. With `group` mean and variance are over the samples
    of all its ranks, which must hold batches of one size: an all-reduce of [2, T, C] forward, in
    fp64, and one backward. `implementation` as in `kernels.dispatch`.

    Raises ValueError for shapes that do not fit, an empty video without `statistics`, and
    `statistics` together with `group`; ImplementationError for an implementation that cannot run.

    >>> x_BTCHW, gain_BC, bias_BC = torch.randn(2, 3, 8, 4, 4), torch.ones(2, 8), torch.zeros(2, 8)
    >>> y_BTCHW = kernels.frame_norm(x_BTCHW, gain_BC, bias_BC)
    >>> fixed = kernels.frame_statistics(x_BTCHW)  # for inference
    >>> torch.equal(y_BTCHW, kernels.frame_norm(x_BTCHW, gain_BC, bias_BC, statistics=fixed))
    True
    """
    operands, method = prepare(x_BTCHW, gain, bias, statistics, group, implementation)
    return apply(operands, method, x_BTCHW.shape[3:])


def apply(operands: NormOperands, method: NormMethod, size: tuple[int, ...]) -> Tensor:
    """y of H x W = `size`, from the operands and the method that `prepare` returns."""
    if method.implementation == REFERENCE:
        y_BTSC = frame_norm_pytorch.normalize(operands)
    elif torch.is_grad_enabled():
        y_BTSC = frame_normalize(*operands, *method)
    else:
        y_BTSC = untracked_normalize(operands, method)
    return y_BTSC.unflatten(2, size).permute(0, 1, 4, 2, 3)


def prepare(
    x_BTCHW: Tensor,
    gain: Tensor,
    bias: Tensor,
    statistics: tuple[Tensor, Tensor] | None,
    group: dist.ProcessGroup | None,
    implementation: str | None,
    moments: tuple[Tensor, Tensor] | None = None,
) -> tuple[NormOperands, NormMethod]:
    """Operands and method of a norm. Arguments as `frame_norm`'s; `moments` are mean and variance
    of x, if whoever made x has measured them."""
    _check(x_BTCHW, gain, bias, statistics)
    if statistics is None:
        _require_values(x_BTCHW)
    elif group is not None:
        raise ValueError("given statistics are not synchronised: pass either them or a group")
    implementation = OPERATOR.choose(implementation, x_BTCHW.device, x_BTCHW.dtype)
    implementation = implementation if x_BTCHW.numel() else REFERENCE
    method = NormMethod(statistics is None, group_name(group), implementation)
    x_BTSC = rows(x_BTCHW)
    gain_BtC, bias_BtC = (v[:, None] if v.dim() == 2 else v for v in (gain, bias))
    if statistics is not None:
        dtype = torch.promote_types(x_BTCHW.dtype, torch.float32)
        mean_TC, var_TC = (v.to(dtype).contiguous() for v in statistics)
    elif implementation == REFERENCE:
        mean_TC, var_TC = frame_norm_pytorch.moments(x_BTSC, method.group)
    else:
        with torch.no_grad():  # frame_normalize takes the gradient through them as well
            mean_TC, var_TC = moments or untracked_moments(x_BTSC, implementation)
            mean_TC, var_TC = _synchronized(mean_TC, var_TC, method.group)
    operands = NormOperands(x_BTSC, gain_BtC.contiguous(), bias_BtC.contiguous(), mean_TC, var_TC)
    return operands, method


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
    statistics: tuple[Tensor, Tensor] | None,
) -> None:
    if x_BTCHW.dim() != 5:
        raise ValueError(f"x must be [B, T, C, H, W], not {tuple(x_BTCHW.shape)}")
    B, T, C = x_BTCHW.shape[:3]
    for name, scale in (("gain", gain), ("bias", bias)):
        if tuple(scale.shape) not in ((B, C), (B, T, C)):
            expected = f"[{B}, {C}] or [{B}, {T}, {C}]"
            raise ValueError(f"{name} must be {expected}, not {tuple(scale.shape)}")
    for name, value in zip(("mean", "var"), statistics or (), strict=False):
        if tuple(value.shape) != (T, C):
            raise ValueError(f"{name} must be [{T}, {C}], not {tuple(value.shape)}")
