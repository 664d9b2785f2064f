"""Resampling folded into a convolution's kernel.

The mean of two neighbouring outputs of a kernel w, and w read from a signal whose every sample
stands there twice, both sum neighbouring taps: they need w convolved with the box [1, 1], of one
tap more,

    [w0, w1, w2] → [w0, w0 + w1, w1 + w2, w2],

at every second position. Zero padding stays what it was. Folding is linear in w, so gradients of
any order are autograd's, and it is done in the precision of the weight as it is kept (fp32);
rounding to the activations' dtype comes last and once.
"""

import math

import torch
from torch import Tensor


def convolve_box(weight: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The kernel convolved with [1, 1] along each of `axes`: k taps become k + 1."""
    for axis in axes:
        zero = torch.zeros_like(weight.narrow(axis, 0, 1))
        weight = torch.cat([weight, zero], axis) + torch.cat([zero, weight], axis)
    return weight


def pooling_kernel(weight_OkI: Tensor, pooling: tuple[int, ...]) -> Tensor:
    """A convolution and the average pooling after it as one kernel, whose stride is `pooling`.

    The weight is [O, one axis of taps per entry of `pooling`, I]; entries are 1 or 2.
    """
    axes = tuple(1 + axis for axis, size in enumerate(pooling) if size == 2)
    return convolve_box(weight_OkI, axes) / math.prod(pooling)


def upsampling_kernel(weight_OhwI: Tensor) -> Tensor:
    """[O, 3, 3, I] → [O, 4, 4, I], the transposed convolution (stride 2, padding 1) that equals
    nearest 2x upsampling and the convolution after it."""
    return convolve_box(weight_OhwI, (1, 2)).flip(1, 2)


def phase_kernels(weight_OhwI: Tensor) -> Tensor:
    """[O, 3, 3, I] → [2*2*O, 2, 2, I], a kernel for every phase (even, odd row; even, odd column).

    Output pixel 2i reads input pixels i-1 and i, pixel 2i+1 reads i and i+1.
    """
    taps_OaqbrI = convolve_box(weight_OhwI, (1, 2)).unflatten(2, (2, 2)).unflatten(1, (2, 2))
    return taps_OaqbrI.permute(2, 4, 0, 1, 3, 5).flatten(0, 2)
