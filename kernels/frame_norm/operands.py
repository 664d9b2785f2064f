"""The tensors that every implementation of `kernels.frame_norm` takes, and how it is to run."""

from typing import NamedTuple

from torch import Tensor

EPSILON = 1e-4  # Decided: BigGAN's value; the paper, which builds on its networks, gives none


class NormOperands(NamedTuple):
    """A video as rows, and what it is normalised, scaled and shifted by. Contiguous."""

    x_BTSC: Tensor
    """fp32, fp16, bf16 or fp64; the other tensors are fp32, or fp64 if x is."""
    gain_BtC: Tensor
    """t is 1 or T."""
    bias_BtC: Tensor
    mean_TC: Tensor
    var_TC: Tensor


class NormMethod(NamedTuple):
    """Which implementation runs, and how the gradient is taken."""

    own_statistics: bool
    """Whether mean and variance are x's own, so that its gradient passes through them."""
    group: str
    """The ranks whose samples share the statistics, by name; "" for this rank alone."""
    implementation: str
