"""Resampling folded into a convolution's kernel.

Pooling takes the mean of two neighbouring outputs of a kernel w. Upsampling lets w read every
sample twice. Both sum neighbouring taps, so both are w convolved with the box [1, 1],

    [w0, w1, w2] → [w0, w0 + w1, w1 + w2, w2],

at every second position. Zero padding stays what it was. Folding is linear in w, so autograd gives
gradients of any order. It is done in the precision of the weight as it is kept (fp32), and rounded
to the activations' dtype last and once.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Fold = Literal["upsampling"] | tuple[int, ...] | None
"""What is folded into a kernel: nothing, upsampling before it, or pooling after it."""
FOLDS: tuple[Fold, ...] = (None, "upsampling", (2, 2), (1, 2, 2), (2, 2, 2))


class Folded(NamedTuple):
    """A kernel that has the resampling in it already."""

    kernel: Tensor
    fold: Fold
    """What was folded into it."""


def folded(weight: Tensor | Folded, how: Fold) -> Tensor:
    """The kernel of a weight with its resampling in it.

    Raises ValueError where something else was folded into it before.
    """
    if not isinstance(weight, Folded):
        return fold(weight, how)
    if weight.fold != how:
        raise ValueError(f"a kernel that {weight.fold} was folded into is not one of {how}")
    return weight.kernel


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


def fold(weight: Tensor, how: Fold) -> Tensor:
    """The kernel with its resampling in it, by name: `upsampling_kernel` or `pooling_kernel`."""
    if how is None:
        return weight
    return upsampling_kernel(weight) if how == "upsampling" else pooling_kernel(weight, how)


def unfold(kernel: Tensor, how: Fold) -> Tensor:
    """The adjoint of `fold`: from the gradient of a folded kernel to that of the weight."""
    if how is None:
        return kernel
    pooling = (2, 2) if how == "upsampling" else how
    if how == "upsampling":
        kernel = kernel.flip(1, 2)
    for axis, size in enumerate(pooling, start=1):
        if size == 2:
            taps = kernel.shape[axis] - 1
            kernel = kernel.narrow(axis, 0, taps) + kernel.narrow(axis, 1, taps)
    return kernel if how == "upsampling" else kernel / math.prod(pooling)


def folded_shape(shape: tuple[int, ...], how: Fold) -> tuple[int, ...]:
    """Of the kernel that a weight is folded into: a tap more along every resampled axis."""
    if how is None:
        return shape
    pooling = (2, 2) if how == "upsampling" else how
    taps = (length + int(size == 2) for length, size in zip(shape[1:-1], pooling, strict=True))
    return (shape[0], *taps, shape[-1])


def check_fold(shape: tuple[int, ...], how: Fold) -> None:
    """Raises ValueError where a weight of this shape cannot be folded so."""
    if how is None:
        return
    if how == "upsampling":
        if len(shape) != 4 or shape[1:3] != (3, 3):
            raise ValueError(f"upsampling is folded into weights [O, 3, 3, I], not {shape}")
    elif how not in FOLDS:
        raise ValueError(f"what is folded must be upsampling or a pooling, not {how!r}")
    elif len(shape) != len(how) + 2:
        raise ValueError(f"pooling {how} does not fit a weight of shape {shape}")
