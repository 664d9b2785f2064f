# mypy: allow-untyped-defs
# ruff: noqa: E741  (I and O are input and output channels)
"""A convolution of stride 1 with "same" zero padding and all its terms, as one Triton kernel.

Kept for a GPU to judge: nothing runs it unless it is asked for by name, because it was predicted to
lose to cuDNN followed by `epilogue.py` and has not been measured.

    convolve    x, W, terms → y, moments per tile   → merge_moments → mean, var [T, O]

An implicit matrix product of rows (the pixels of one time step), columns (output channels) and
kt·kh·kw·I products, so 3x1x1, 1x3x3, 1x1x1 and 3x3x3 are one kernel; taps that lie in the time
before the first or after the last frame are left out, not multiplied by zero. Terms, moments,
rounding and offsets are as in `epilogue.py`.

Shapes: B batch, T frames, I input and O output channels, H x W pixels; x_l has t frames of h x w.
FLOPs: 2·kt·kh·kw·I·O per pixel. Least bytes: x, y and the residual once each, the weight once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.tiling import ceil_div
from kernels.convolution.epilogue import (
    Moments,
    half_place_of,
    is_half,
    low_frame_of,
    low_place_of,
    low_sizes,
    merge,
)
from kernels.convolution.tiles import Skip, check_convolution, check_terms, configuration

# Tiles of this many rows, times all columns, run one after the other: they share their rows of x,
# and all of them one read of the weight, while both are in the L2 cache.
GROUP = 8
LOW_BLOCK = tl.constexpr(16)


@triton.jit
def projection(
    video_ptr, low_weight_ptr, low_pixel, valid_o, low_channels, dtype: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """x_l at `low_pixel`, projected, as the first products of a tile's sums.

    Its three channels are padded to the sixteen of a matrix product: as three products of vectors
    behind the others they would take 100 registers more, and with them the second block.
    """
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in tl.range(0, low_channels, BLOCK_L, num_stages=1):
        i = first + tl.arange(0, BLOCK_L)
        video_at = (low_pixel.to(tl.int64) * low_channels)[:, None] + i[None, :]
        weight_at = (valid_o * low_channels)[None, :] + i[:, None]
        inside = i < low_channels
        value = tl.load(video_ptr + video_at, mask=inside[None, :], other=0.0)
        weight = tl.load(low_weight_ptr + weight_at, mask=inside[:, None], other=0.0)
        sums = tl.dot(value.to(dtype), weight.to(dtype), sums, input_precision="ieee")
    return sums


@triton.jit
def convolve_kernel(
    x_ptr, weight_ptr, y_ptr, bias_ptr, residual_ptr,
    video_ptr, low_weight_ptr, low_bias_ptr, split_mean_ptr, split_square_ptr,
    B, T, H, W, I, O, low_frames, low_height, low_width, low_channels,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, MASK_K: tl.constexpr,
    HALF: tl.constexpr, RELU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile of y; its mean and centred sum of squares where there is a `split_mean_ptr`.

    `HALF`: the residual is of half of y's height and width, to be upsampled.
    """
    rows = B * H * W
    num_row_tiles, num_column_tiles = tl.cdiv(rows, BLOCK_M), tl.cdiv(O, BLOCK_N)
    group = tl.program_id(0) // (GROUP_M * num_column_tiles)
    place = tl.program_id(0) % (GROUP_M * num_column_tiles)
    group_rows = tl.minimum(T * num_row_tiles - group * GROUP_M, GROUP_M)
    row_tile = group * GROUP_M + place % group_rows
    t = row_tile // num_row_tiles
    first_row = (row_tile % num_row_tiles) * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    o = (place // group_rows) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < rows

    # Clamped, not masked: what is past the end is read again, multiplied, and never stored.
    valid_row, valid_o = tl.minimum(row, rows - 1), tl.minimum(o, O - 1)
    b, s = valid_row // (H * W), valid_row % (H * W)
    i, j = s // W, s % W
    pixel = ((b * T + t) * (H * W) + s).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + (pixel * I)[:, None] + k[None, :]
    weight_ptrs = weight_ptr + (valid_o.to(tl.int64) * (KT * KH * KW * I))[None, :] + k[:, None]

    first_tap = tl.maximum(KT // 2 - t, 0) * (KH * KW)
    num_taps = tl.minimum(T + KT // 2 - t, KT) * (KH * KW) - first_tap
    if video_ptr is not None:
        low_frame = low_frame_of(b, t, T, low_frames) * (low_height * low_width)
        low_pixel = low_frame + low_place_of(i, j, H, W, low_height, low_width)
        sums = projection(
            video_ptr, low_weight_ptr, low_pixel, valid_o, low_channels, x_ptr.dtype.element_ty,
            BLOCK_M, BLOCK_N, LOW_BLOCK,
        )  # fmt: skip
    else:
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # Taps change fastest: nine reads of a pixel's channels follow each other, eight from the cache.
    # One loop, not two, so that loads for the next channels start before the last tap is done.
    for step in range(0, num_taps * tl.cdiv(I, BLOCK_K)):
        tap = first_tap + step % num_taps
        first_k = step // num_taps * BLOCK_K
        up, right = tap // KW % KH - KH // 2, tap % KW - KW // 2
        shift = ((tap // (KH * KW) - KT // 2) * H + up) * W + right
        x_at = x_ptrs + (shift.to(tl.int64) * I + first_k)
        weight_at = weight_ptrs + (tap.to(tl.int64) * I + first_k)
        if KH * KW > 1:
            within = (i + up >= 0) & (i + up < H) & (j + right >= 0) & (j + right < W)
            if MASK_K:
                x = tl.load(x_at, mask=within[:, None] & (k < I - first_k)[None, :], other=0.0)
            else:
                x = tl.load(x_at, mask=within[:, None], other=0.0)
        elif MASK_K:
            x = tl.load(x_at, mask=(k < I - first_k)[None, :], other=0.0)
        else:
            x = tl.load(x_at)
        if MASK_K:
            weight = tl.load(weight_at, mask=(k < I - first_k)[:, None], other=0.0)
        else:
            weight = tl.load(weight_at)
        sums = tl.dot(x, weight, sums, input_precision="ieee")

    at = (pixel * O)[:, None] + o[None, :]
    mask = inside[:, None] & (o < O)[None, :]
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + valid_o).to(tl.float32)[None, :]
    if video_ptr is not None:
        sums += tl.load(low_bias_ptr + valid_o).to(tl.float32)[None, :]
    if residual_ptr is not None:
        residual_at = at
        if HALF:
            half_pixel = (b * T + t) * (H * W // 4) + half_place_of(s, W)
            residual_at = (half_pixel.to(tl.int64) * O)[:, None] + o[None, :]
        sums += tl.load(residual_ptr + residual_at, mask=mask, other=0.0).to(tl.float32)
    if RELU:  # written so that NaN stays
        sums = tl.where(sums <= 0.0, 0.0, sums)
    stored = sums.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + at, stored, mask=mask)

    if split_mean_ptr is not None:
        # Of what the norm will read, which is not what it was before it was rounded.
        values = stored.to(tl.float32)
        count = tl.minimum(rows - first_row, BLOCK_M).to(tl.float32)
        mean = tl.sum(tl.where(inside[:, None], values, 0.0), 0) / count
        apart = tl.where(inside[:, None], values - mean[None, :], 0.0)
        split_at = row_tile.to(tl.int64) * O + o
        tl.store(split_mean_ptr + split_at, mean, mask=o < O)
        tl.store(split_square_ptr + split_at, tl.sum(apart * apart, 0), mask=o < O)


def convolve(
    x_BTHWI: Tensor,
    weight_OthwI: Tensor,
    bias_O: Tensor | None,
    residual_BTHWO: Tensor | None,
    skip: Skip | None,
    moments: bool,
    relu: bool = False,
) -> tuple[Tensor, Moments | None]:
    """y, [B, T, H, W, O] of the dtype of x, and its moments if asked for.

    A residual of half of y's height and width is upsampled to nearest neighbours.
    kt, kh and kw are odd. Raises ValueError for shapes that do not fit, tensors that are not
    contiguous, and moments of an empty video; without moments an empty video gives an empty y.
    """
    check_convolution(x_BTHWI, weight_OthwI)
    (B, T, H, W, I), (O, *sizes) = x_BTHWI.shape, weight_OthwI.shape[:4]
    check_terms((B, T, H, W, O), bias_O, residual_BTHWO, skip, moments)
    y_BTHWO = x_BTHWI.new_empty((B, T, H, W, O))
    rows = B * H * W
    if T * rows == 0:
        return y_BTHWO, None
    config = configuration(x_BTHWI.dtype, rows, I, O)
    num_row_tiles = ceil_div(rows, config.block_m)
    splits = y_BTHWO.new_empty((2, T, num_row_tiles, O), dtype=torch.float32) if moments else None
    convolve_kernel[(T * num_row_tiles * ceil_div(O, config.block_n),)](
        x_BTHWI, weight_OthwI, y_BTHWO, bias_O, residual_BTHWO, *(skip or (None,) * 3),
        *((None, None) if splits is None else splits),
        B, T, H, W, I, O, *low_sizes(skip),
        *sizes, I % config.block_k != 0, is_half(residual_BTHWO, H), relu,
        **config.tile, GROUP_M=GROUP, **config.options,
    )  # fmt: skip
    # A time step's rows are one long frame to the merge.
    return y_BTHWO, None if splits is None else merge(splits, 1, T, rows, config.block_m)
