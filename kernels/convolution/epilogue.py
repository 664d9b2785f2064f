# mypy: allow-untyped-defs
# ruff: noqa: E741  (I and O are input and output channels)
"""One Triton pass over a convolution's result: all that "epilogue" adds to what cuDNN made.

    add_terms   y, terms → y, moments per split     → merge_moments → mean, var [T, O]

y [+ bias] [+ residual] [+ projected x_l], of which `relu` keeps what is positive, and of y as it is
stored, per time step and channel, the mean and biased variance that the next norm wants. y and the
residual are read once, y is written once.

Sums are fp32, and a value is rounded once, when it is stored. Moments go through memory and are
merged in a fixed order, as in `kernels.frame_norm.triton`: the same inputs give the same bits.
Tensors are contiguous, channels innermost. Offsets of values are int64.

Shapes: B batch, T frames, O output channels, H x W pixels; x_l has t frames of h x w.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.tiling import ceil_div
from kernels.convolution.tiles import Skip, check_layout, check_terms
from kernels.frame_norm.triton import (
    OPTIONS,
    collapse_moments,
    merge_moments_kernel,
    own_split,
    plan,
    push_moments,
)

Moments = tuple[Tensor, Tensor]
"""Mean and biased variance, each [T, O] fp32."""

# A time step of 128x128 pixels and four samples has 512 tiles: long strides keep the merge short.
MERGE_TILE = {"BLOCK_P": 64, "BLOCK_C": 16}


@triton.jit
def low_frame_of(b, t, T, low_frames):
    """The frame of x_l that is repeated at frame t of sample b."""
    return b * low_frames + t // (T // low_frames)


@triton.jit
def low_place_of(i, j, H, W, low_height, low_width):
    """The pixel of x_l's frame that pixel (i, j) keeps."""
    return i * (low_height // H) * low_width + j * (low_width // W)


@triton.jit
def half_place_of(s, W):
    """The pixel of a frame of half the size that is upsampled to pixel s."""
    return s // W // 2 * (W // 2) + s % W // 2


@triton.jit
def add_terms_kernel(
    y_ptr, result_ptr, bias_ptr, residual_ptr,
    video_ptr, low_weight_ptr, low_bias_ptr, split_mean_ptr, split_square_ptr,
    T, H, W, O, num_splits, split_rows, low_frames, low_height, low_width, low_channels,
    HALF: tl.constexpr, RELU: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y with its terms, one split of a frame; its moments where there is a `split_mean_ptr`.

    `HALF`: the residual is of half of y's height and width, to be upsampled.
    """
    S = H * W
    index, frame, first, last, o = own_split(S, num_splits, split_rows, BLOCK_C)
    valid_o = tl.minimum(o, O - 1)
    y_ptr += frame * S * O
    result_ptr += frame * S * O
    if residual_ptr is not None:
        residual_ptr += frame * (S // 4 if HALF else S) * O
    if video_ptr is not None:
        low_frame = low_frame_of(frame // T, frame % T, T, low_frames)
        video_ptr += low_frame * (low_height * low_width * low_channels)

    mean = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    square = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    count = tl.zeros([BLOCK_S], tl.float32)
    num_seen = 0.0
    for start in range(first, last, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        mask = (s < last)[:, None] & (o < O)[None, :]
        at = s[:, None] * O + o[None, :]
        y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + valid_o).to(tl.float32)[None, :]
        if residual_ptr is not None:
            residual_at = half_place_of(s, W)[:, None] * O + o[None, :] if HALF else at
            y += tl.load(residual_ptr + residual_at, mask=mask, other=0.0).to(tl.float32)
        if video_ptr is not None:
            y += tl.load(low_bias_ptr + valid_o).to(tl.float32)[None, :]
            valid_s = tl.minimum(s, S - 1)
            low_at = low_place_of(valid_s // W, valid_s % W, H, W, low_height, low_width)
            # Not a matrix product: this pass waits for memory, and a tile may have one channel.
            for i in range(0, low_channels):
                value = tl.load(video_ptr + low_at * low_channels + i).to(tl.float32)
                weight = tl.load(low_weight_ptr + valid_o * low_channels + i).to(tl.float32)
                y += value[:, None] * weight[None, :]
        if RELU:  # written so that NaN stays
            y = tl.where(y <= 0.0, 0.0, y)
        stored = y.to(result_ptr.dtype.element_ty)
        tl.store(result_ptr + at, stored, mask=mask)
        if split_mean_ptr is not None:
            num_seen += 1.0
            mean, square = push_moments(mean, square, stored.to(tl.float32), mask, num_seen)
            count += tl.where(s < last, 1.0, 0.0)

    if split_mean_ptr is not None:
        split_mean, split_square = collapse_moments(mean, square, count)
        tl.store(split_mean_ptr + index * O + o, split_mean, mask=o < O)
        tl.store(split_square_ptr + index * O + o, split_square, mask=o < O)


def add_terms(
    y_BTHWO: Tensor,
    bias_O: Tensor | None,
    residual_BTHWO: Tensor | None,
    skip: Skip | None,
    moments: bool,
    relu: bool = False,
    *,
    in_place: bool = False,
) -> tuple[Tensor, Moments | None]:
    """y with its terms, in the dtype of y, and its moments if asked for; as `convolve`'s.

    `in_place` overwrites y and returns it: for a caller that made y and keeps no other use of it.
    """
    if y_BTHWO.ndim != 5:
        raise ValueError(f"y must be [B, T, H, W, O], not {[*y_BTHWO.shape]}")
    check_layout(y=y_BTHWO)
    B, T, H, W, O = y_BTHWO.shape
    check_terms((B, T, H, W, O), bias_O, residual_BTHWO, skip, moments)
    result_BTHWO = y_BTHWO if in_place else torch.empty_like(y_BTHWO)
    if y_BTHWO.numel() == 0:
        return result_BTHWO, None
    cut = plan(B, T, H * W, O)
    splits = None
    if moments:
        splits = y_BTHWO.new_empty((2, B, T, cut.num_splits, O), dtype=torch.float32)
    add_terms_kernel[cut.streaming_grid](
        y_BTHWO, result_BTHWO, bias_O, residual_BTHWO, *(skip or (None,) * 3),
        *((None, None) if splits is None else splits),
        T, H, W, O, cut.num_splits, cut.split_rows, *low_sizes(skip),
        is_half(residual_BTHWO, H), relu, **cut.tile,
    )  # fmt: skip
    return result_BTHWO, None if splits is None else merge(splits, B, T, H * W, cut.split_rows)


def merge(splits: Tensor, num_frames: int, T: int, S: int, split_rows: int) -> Moments:
    """Mean and variance, [T, O], of the moments of splits, [2, num_frames, T, splits, O]."""
    num_splits, O = splits.shape[-2:]
    # Two tensors, not views of one: an operator's results must not share memory.
    mean_TO, var_TO = (splits.new_empty(T, O) for _ in range(2))
    merge_moments_kernel[(T, ceil_div(O, MERGE_TILE["BLOCK_C"]))](
        *splits, mean_TO, var_TO,
        num_frames, T, S, O, num_splits, split_rows, float(num_frames * S), **MERGE_TILE, **OPTIONS,
    )  # fmt: skip
    return mean_TO, var_TO


def is_half(residual_BTHWO: Tensor | None, H: int) -> bool:
    """Whether a residual is to be upsampled to y's height."""
    return residual_BTHWO is not None and residual_BTHWO.shape[2] != H


def low_sizes(skip: Skip | None) -> tuple[int, ...]:
    """t, h, w and channels of x_l."""
    return (1, 1, 1, 1) if skip is None else tuple(skip[0].shape[1:])
