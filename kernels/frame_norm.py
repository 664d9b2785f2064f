"""Per-frame conditional batch norm with ReLU.

y[b,t,c] = relu(gain[b,c] · (x[b,t,c] - mean[t,c]) / sqrt(var[t,c] + eps) + bias[b,c])

SSW-GAN, section 3.2 (as DVD-GAN): every time step has its own mean and (biased) variance, taken
over batch and space; there is no running average. For inference the statistics are given.

Shapes: B batch, T frames, C channels, H x W pixels; statistics [T, C], gain and bias [B, C].
Statistics and arithmetic are fp32 (fp64 for fp64 input) whatever x is: in bf16, x² would keep
eight bits. Bytes: x three times (mean, centred square, output), y once; 8 FLOPs per element.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.layout import channels_last

EPSILON = 1e-4  # BigGAN's, whose networks the paper builds on


def frame_statistics(x_BTCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every (time step, channel), each [T, C]."""
    x_BTSC = _wide_rows(x_BTCHW)
    mean_TC = _mean(x_BTSC)
    return mean_TC, _mean((x_BTSC - mean_TC[:, None]).square())


def frame_norm(
    x_BTCHW: Tensor,
    gain_BC: Tensor,
    bias_BC: Tensor,
    *,
    relu: bool = True,
    eps: float = EPSILON,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Normalise per (time step, channel), scale and shift per sample; same shape and dtype as x.

    `statistics` = (mean_TC, var_TC) replaces the batch's own; gradients then do not pass through
    them unless they carry some.
    """
    x_BTSC = _wide_rows(x_BTCHW)
    dtype = x_BTSC.dtype
    mean_TC = _mean(x_BTSC) if statistics is None else statistics[0].to(dtype)
    # Centred before it is squared or scaled: both cancel where |mean| is large against std.
    centred = x_BTSC - mean_TC[:, None]
    var_TC = _mean(centred.square()) if statistics is None else statistics[1].to(dtype)
    scale_BTC = gain_BC.to(dtype)[:, None] * torch.rsqrt(var_TC + eps)
    y_BTSC = torch.addcmul(bias_BC.to(dtype)[:, None, None], centred, scale_BTC[:, :, None])
    y_BTSC = y_BTSC.to(x_BTCHW.dtype)
    y_BTSC = F.relu(y_BTSC) if relu else y_BTSC
    return y_BTSC.unflatten(2, x_BTCHW.shape[3:]).permute(0, 1, 4, 2, 3)


def _wide_rows(x_BTCHW: Tensor) -> Tensor:
    """Pixels S = H·W as rows of C, in at least fp32; on a CPU four times as fast as [.., H, W]."""
    x_BTSC = channels_last(x_BTCHW).permute(0, 1, 3, 4, 2).flatten(2, 3)
    return x_BTSC.to(torch.promote_types(x_BTCHW.dtype, torch.float32))


def _mean(x_BTSC: Tensor) -> Tensor:
    """Mean over space, then batch: [T, C]."""
    return x_BTSC.mean(dim=2).mean(dim=0)
