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

EPSILON = 1e-4  # BigGAN's, whose networks the paper builds on


def frame_statistics(x_BTCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every (time step, channel), each [T, C]."""
    x = x_BTCHW.to(_wide(x_BTCHW.dtype))
    var_TC, mean_TC = torch.var_mean(x, dim=(0, 3, 4), correction=0)
    return mean_TC, var_TC


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
    mean_TC, var_TC = frame_statistics(x_BTCHW) if statistics is None else statistics
    dtype = _wide(x_BTCHW.dtype)
    scale_BTC = gain_BC.to(dtype)[:, None] * torch.rsqrt(var_TC.to(dtype) + eps)
    # Centred before it is scaled: x·scale - mean·scale cancels where |mean| is large against std.
    y = (x_BTCHW.to(dtype) - mean_TC.to(dtype)[:, :, None, None]) * scale_BTC[..., None, None]
    y = (y + bias_BC.to(dtype)[:, None, :, None, None]).to(x_BTCHW.dtype)
    return F.relu(y) if relu else y


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
