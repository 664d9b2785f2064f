"""The passes of `kernels.frame_norm` in PyTorch operators: the reference, and the backward passes.

`moments` and `normalize` are differentiable and together the reference; `sums` and `dx` are the
closed form of their gradient. Names, arguments and results are those of `frame_norm_triton`;
fp32 inside, fp64 for fp64. Shapes as in `frame_norm`, with S = H·W pixels as rows of C channels:
on a CPU four times as fast as [.., H, W].
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.collectives import mean_over


def moments(x_BTSC: Tensor, group: str = "") -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every (time step, channel), each [T, C].

    Over the ranks of `group` too, in two all-reduces; its ranks must hold batches of one size.
    """
    wide = widened(x_BTSC)
    mean_TC = mean_over(_mean(wide), group)
    return mean_TC, mean_over(_mean((wide - mean_TC[:, None]).square()), group)


def normalize(
    x_BTSC: Tensor,
    gain_BtC: Tensor,
    bias_BtC: Tensor,
    mean_TC: Tensor,
    var_TC: Tensor,
    residual_BTSC: Tensor | None,
    eps: float,
    relu: bool,
) -> Tensor:
    """y in the dtype of x."""
    wide = widened(x_BTSC)
    mean_TC, var_TC = mean_TC.to(wide.dtype), var_TC.to(wide.dtype)
    # Centred before it is squared or scaled: both cancel where |mean| is large against std.
    centred = wide - mean_TC[:, None]
    scale_BTC = gain_BtC.to(wide.dtype) * torch.rsqrt(var_TC + eps)
    y_BTSC = torch.addcmul(bias_BtC.to(wide.dtype)[:, :, None], centred, scale_BTC[:, :, None])
    y_BTSC = F.relu(y_BTSC, inplace=True) if relu else y_BTSC
    y_BTSC = y_BTSC if residual_BTSC is None else y_BTSC + residual_BTSC
    return y_BTSC.to(x_BTSC.dtype)


def sums(
    dy_BTSC: Tensor,
    x_BTSC: Tensor,
    gain_BtC: Tensor,
    bias_BtC: Tensor,
    mean_TC: Tensor,
    var_TC: Tensor,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """(S1, S2) as [2, B, T, C], and Σ_b gain·(S1, S2) as [2, T, C]."""
    dy_BTSC, centred, rstd_TC, _ = _passed(
        dy_BTSC, x_BTSC, gain_BtC, bias_BtC, mean_TC, var_TC, eps, relu
    )
    sums_2BTC = torch.stack([dy_BTSC.sum(2), centred.mul_(dy_BTSC).sum(2) * rstd_TC])
    return sums_2BTC, (sums_2BTC * gain_BtC).sum(1)


def dx(
    dy_BTSC: Tensor,
    x_BTSC: Tensor,
    gain_BtC: Tensor,
    bias_BtC: Tensor,
    mean_TC: Tensor,
    var_TC: Tensor,
    terms_2TC: Tensor | None,
    eps: float,
    relu: bool,
) -> Tensor:
    """dx in the dtype of x; `terms` None: the statistics do not depend on x."""
    dy_BTSC, centred, rstd_TC, scale_BTC = _passed(
        dy_BTSC, x_BTSC, gain_BtC, bias_BtC, mean_TC, var_TC, eps, relu
    )
    dx_BTSC = dy_BTSC * scale_BTC[:, :, None]
    if terms_2TC is not None:
        offset_TC, slope_TC = terms_2TC * torch.stack([rstd_TC, rstd_TC.square()])
        dx_BTSC -= centred.mul_(slope_TC[:, None]).add_(offset_TC[:, None])
    return dx_BTSC.to(x_BTSC.dtype)


def _passed(
    dy_BTSC: Tensor,
    x_BTSC: Tensor,
    gain_BtC: Tensor,
    bias_BtC: Tensor,
    mean_TC: Tensor,
    var_TC: Tensor,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dy where relu was open, x - mean, 1 / std, gain / std), recomputed from x."""
    centred = widened(x_BTSC) - mean_TC[:, None]
    rstd_TC = torch.rsqrt(var_TC + eps)
    scale_BTC = gain_BtC.to(centred.dtype) * rstd_TC
    dy_BTSC = dy_BTSC.to(centred.dtype)
    if relu:
        bias = bias_BtC.to(centred.dtype)[:, :, None]
        before_relu = torch.addcmul(bias, centred, scale_BTC[:, :, None])
        dy_BTSC = torch.ops.aten.threshold_backward(dy_BTSC, before_relu, 0)
    return dy_BTSC, centred, rstd_TC, scale_BTC


def widened(x: Tensor) -> Tensor:
    """x in at least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _mean(x_BTSC: Tensor) -> Tensor:
    """Mean over space, then batch: [T, C]."""
    return x_BTSC.mean(dim=2).mean(dim=0)
