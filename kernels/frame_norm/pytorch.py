"""The passes of `kernels.frame_norm` in PyTorch operators: the reference, and the backward passes.

`moments` and `normalize` are differentiable and together the reference; `sums` and `dx` are the
closed form of their gradient. `cpu.py` and `triton.py` have functions of the same names, arguments
and results. Arithmetic is fp32, and fp64 for fp64. Shapes as in `frame_norm`, with S = H·W pixels
as rows of C channels: on a CPU four times as fast as [.., H, W].
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.common.collectives import mean_over
from kernels.frame_norm.operands import EPSILON, NormOperands


def moments(x_BTSC: Tensor, group: str = "") -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every (time step, channel), each [T, C].

    Over the ranks of `group` too, in two all-reduces; its ranks must hold batches of one size.
    """
    wide = widened(x_BTSC)
    mean_TC = mean_over(_mean(wide), group)
    centred = wide - mean_TC[:, None]
    # In place where autograd does not look: large new memory costs a CPU more than the arithmetic.
    squares = centred.square() if torch.is_grad_enabled() else centred.square_()
    return mean_TC, mean_over(_mean(squares), group)


def normalize(operands: NormOperands) -> Tensor:
    """y in the dtype of x."""
    x_BTSC, gain_BtC, bias_BtC, mean_TC, var_TC = operands
    wide = widened(x_BTSC)
    mean_TC, var_TC = mean_TC.to(wide.dtype), var_TC.to(wide.dtype)
    # Centred before it is squared or scaled: both cancel where |mean| is large against std.
    centred = wide - mean_TC[:, None]
    scale_BTC = gain_BtC.to(wide.dtype) * torch.rsqrt(var_TC + EPSILON)
    bias, scale = bias_BtC.to(wide.dtype)[:, :, None], scale_BTC[:, :, None]
    if torch.is_grad_enabled():
        y_BTSC = torch.addcmul(bias, centred, scale)
    else:
        y_BTSC = torch.addcmul(bias, centred, scale, out=centred)
    return F.relu(y_BTSC, inplace=True).to(x_BTSC.dtype)


def sums(dy_BTSC: Tensor, operands: NormOperands) -> tuple[Tensor, Tensor]:
    """(S1, S2) as [2, B, T, C], and Σ_b gain·(S1, S2) as [2, T, C]."""
    return passed(dy_BTSC, operands).sums(operands.gain_BtC)


def dx(dy_BTSC: Tensor, operands: NormOperands, terms_2TC: Tensor | None) -> Tensor:
    """dx in the dtype of x; `terms` None: the statistics do not depend on x."""
    return passed(dy_BTSC, operands).dx_(terms_2TC).to(operands.x_BTSC.dtype)


class Passed(NamedTuple):
    """What both halves of the gradient need, recomputed from x once."""

    dy_BTSC: Tensor
    """dy where relu was open, else 0."""
    centred_BTSC: Tensor
    """x - mean."""
    rstd_TC: Tensor
    scale_BtC: Tensor
    """gain / std."""

    def sums(self, gain_BtC: Tensor) -> tuple[Tensor, Tensor]:
        """As the function `sums`."""
        products = self.centred_BTSC * self.dy_BTSC
        sums_2BTC = torch.stack([self.dy_BTSC.sum(2), products.sum(2) * self.rstd_TC])
        return sums_2BTC, (sums_2BTC * gain_BtC).sum(1)

    def dx_(self, terms_2TC: Tensor | None) -> Tensor:
        """As the function `dx`, in the place of these values: large new memory costs a CPU more
        than the arithmetic."""
        dx_BTSC = self.dy_BTSC.mul_(self.scale_BtC[:, :, None])
        if terms_2TC is None:
            return dx_BTSC
        offset_TC, slope_TC = terms_2TC * torch.stack([self.rstd_TC, self.rstd_TC.square()])
        return dx_BTSC.sub_(self.centred_BTSC.mul_(slope_TC[:, None]).add_(offset_TC[:, None]))


def passed(dy_BTSC: Tensor, operands: NormOperands) -> Passed:
    """The results share no memory with the arguments."""
    x_BTSC, gain_BtC, bias_BtC, mean_TC, var_TC = operands
    centred = widened(x_BTSC) - mean_TC[:, None]
    rstd_TC = torch.rsqrt(var_TC + EPSILON)
    scale_BtC = gain_BtC.to(centred.dtype) * rstd_TC
    bias = bias_BtC.to(centred.dtype)[:, :, None]
    before_relu = torch.addcmul(bias, centred, scale_BtC[:, :, None])
    dy_BTSC = torch.ops.aten.threshold_backward(dy_BTSC.to(centred.dtype), before_relu, 0)
    return Passed(dy_BTSC, centred, rstd_TC, scale_BtC)


def widened(x: Tensor) -> Tensor:
    """x in at least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _mean(x_BTSC: Tensor) -> Tensor:
    """Mean over space, then batch: [T, C]."""
    return x_BTSC.mean(dim=2).mean(dim=0)
