# mypy: allow-untyped-defs
"""Triton kernels of `kernels.frame_norm`, and their launchers.

Memory is read as [B, T, S, C]: frames of S = H·W pixels, each a row of C channels. A *split* is a
run of `split_rows` pixels of one frame; a program of the streaming kernels owns one split of
one frame in one block of channels, and walks through it tile by tile:

    moments    x → mean and centred sum of squares per split     → merge_moments → mean, var [T, C]
    normalize  x → y
    sums       dy, x → S1 = Σ dy·mask, S2 = Σ dy·mask·x̂ per split → merge_sums  → [B, T, C], [T, C]
    dx         dy, x → dx

Sums go through memory and are merged in a fixed order by a second kernel, not by atomics: the
same inputs give the same bits. Splits depend on the shape only, never on the device. All
arithmetic is fp32; offsets of frames are int64, within a frame int32 (checked).
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.tiling import ceil_div, next_power_of_2
from kernels.frame_norm.operands import EPSILON, NormOperands

# A tile is TILE elements: with four warps 16 per thread, two 16-byte loads in bf16.
TILE = 2048
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
MERGE_TILE = {"BLOCK_P": 16, "BLOCK_C": 32}
EPS = tl.constexpr(EPSILON)
# Enough programs to fill any GPU several times over, but four tiles each where x is that large.
MIN_TILES, WANTED_PROGRAMS = 4, 4096


@triton.jit
def own_split(S, num_splits, split_rows, BLOCK_C: tl.constexpr):
    """This program's split, its frame (int64), its first and end row, and its channels."""
    index = tl.program_id(0).to(tl.int64)
    first = (index % num_splits).to(tl.int32) * split_rows
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    return index, index // num_splits, first, tl.minimum(first + split_rows, S), c


@triton.jit
def push_moments(mean, square, x, mask, num_seen):
    """(mean, square) of every element of a tile after its `num_seen`-th value (Welford)."""
    step = tl.where(mask, x - mean, 0.0)
    mean += step * (1.0 / num_seen)
    return mean, square + step * tl.where(mask, x - mean, 0.0)


@triton.jit
def collapse_moments(mean, square, count):
    """(mean, centred sum of squares) per channel of a tile whose rows saw `count` values (Chan)."""
    total = tl.sum(count, 0)
    weighted = mean * count[:, None]
    split_mean = tl.sum(weighted, 0) / total
    apart = mean - split_mean[None, :]
    return split_mean, tl.sum(square + apart * apart * count[:, None], 0)


@triton.jit
def moments_kernel(
    x_ptr, mean_ptr, square_ptr, S, C, num_splits, split_rows,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and centred sum of squares of one split, per channel (Welford, then Chan's merge)."""
    index, frame, first, last, c = own_split(S, num_splits, split_rows, BLOCK_C)
    x_ptr += frame * S * C

    # Every element of the tile keeps its own mean: no reduction across threads inside the loop.
    mean = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    square = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    count = tl.zeros([BLOCK_S], tl.float32)
    num_seen = 0.0
    for start in range(first, last, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        inside = s < last
        mask = inside[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + s[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        num_seen += 1.0
        mean, square = push_moments(mean, square, x, mask, num_seen)
        count += tl.where(inside, 1.0, 0.0)

    split_mean, split_square = collapse_moments(mean, square, count)
    tl.store(mean_ptr + index * C + c, split_mean, mask=c < C)
    tl.store(square_ptr + index * C + c, split_square, mask=c < C)


@triton.jit
def merge_moments_kernel(
    split_mean_ptr, split_square_ptr, mean_ptr, var_ptr, B, T, S, C, num_splits, split_rows, total,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance of one time step from all splits of its B frames.

    `total` = B·S is a float: the integers may be compile-time constants, which have no `.to`.
    """
    t = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)

    weighted = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, B * num_splits, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        split = p % num_splits
        row = ((p // num_splits) * T + t) * num_splits + split
        mask = (p < B * num_splits)[:, None] & (c < C)[None, :]
        count = tl.minimum(S - split * split_rows, split_rows).to(tl.float32)
        mean = tl.load(split_mean_ptr + row[:, None] * C + c[None, :], mask=mask, other=0.0)
        weighted += mean * count[:, None]
    merged = tl.sum(weighted, 0) / total

    squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, B * num_splits, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        split = p % num_splits
        row = ((p // num_splits) * T + t) * num_splits + split
        mask = (p < B * num_splits)[:, None] & (c < C)[None, :]
        count = tl.minimum(S - split * split_rows, split_rows).to(tl.float32)
        mean = tl.load(split_mean_ptr + row[:, None] * C + c[None, :], mask=mask, other=0.0)
        square = tl.load(split_square_ptr + row[:, None] * C + c[None, :], mask=mask, other=0.0)
        apart = tl.where(mask, mean - merged[None, :], 0.0)
        squares += square + apart * apart * count[:, None]
    tl.store(mean_ptr + t * C + c, merged, mask=c < C)
    tl.store(var_ptr + t * C + c, tl.sum(squares, 0) / total, mask=c < C)


@triton.jit
def coefficients(
    gain_ptr, bias_ptr, mean_ptr, var_ptr, frame, c, T, C, gain_frames, bias_frames
):  # fmt: skip
    """(bias, mean, 1 / std, gain / std) of one frame, per channel.

    `gain_frames` is T where the gain has a row per frame, 1 where all frames share one.
    """
    b, t = frame // T, frame % T
    inside = c < C
    gain_row = b * gain_frames + t % gain_frames
    bias_row = b * bias_frames + t % bias_frames
    gain = tl.load(gain_ptr + gain_row * C + c, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + bias_row * C + c, mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + t * C + c, mask=inside, other=0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.load(var_ptr + t * C + c, mask=inside, other=0.0) + EPS)
    return bias, mean, rstd, gain * rstd


@triton.jit
def normalize_kernel(
    x_ptr, gain_ptr, bias_ptr, mean_ptr, var_ptr, y_ptr,
    T, S, C, num_splits, split_rows, gain_frames, bias_frames,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y of one split."""
    _, frame, first, last, c = own_split(S, num_splits, split_rows, BLOCK_C)
    bias, mean, _, scale = coefficients(
        gain_ptr, bias_ptr, mean_ptr, var_ptr, frame, c, T, C, gain_frames, bias_frames
    )
    x_ptr += frame * S * C
    y_ptr += frame * S * C

    for start in range(first, last, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        mask = (s < last)[:, None] & (c < C)[None, :]
        at = s[:, None] * C + c[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        # Centred before it is scaled: the two cancel where |mean| is large against std.
        y = (x - mean[None, :]) * scale[None, :] + bias[None, :]
        # Not tl.maximum, which drops NaN: a network that breaks must show it.
        y = tl.where(y <= 0.0, 0.0, y)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sums_kernel(
    dy_ptr, x_ptr, gain_ptr, bias_ptr, mean_ptr, var_ptr, split_dy_ptr, split_dyx_ptr,
    T, S, C, num_splits, split_rows, gain_frames, bias_frames,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """S1 and S2 of one split, per channel."""
    index, frame, first, last, c = own_split(S, num_splits, split_rows, BLOCK_C)
    bias, mean, rstd, scale = coefficients(
        gain_ptr, bias_ptr, mean_ptr, var_ptr, frame, c, T, C, gain_frames, bias_frames
    )
    dy_ptr += frame * S * C
    x_ptr += frame * S * C

    sum_dy = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    sum_dyx = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for start in range(first, last, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        mask = (s < last)[:, None] & (c < C)[None, :]
        at = s[:, None] * C + c[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        centred = x - mean[None, :]
        dy = tl.where(centred * scale[None, :] + bias[None, :] <= 0.0, 0.0, dy)
        sum_dy += dy
        sum_dyx += dy * centred
    tl.store(split_dy_ptr + index * C + c, tl.sum(sum_dy, 0), mask=c < C)
    tl.store(split_dyx_ptr + index * C + c, tl.sum(sum_dyx, 0) * rstd, mask=c < C)


@triton.jit
def merge_sums_kernel(
    split_dy_ptr, split_dyx_ptr, gain_ptr, sums_ptr, weighted_ptr,
    B, T, C, num_splits, gain_frames,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of one time step: S1 and S2 per sample, and their sums over samples weighted by the gain."""
    t = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    weighted_dy = tl.zeros([BLOCK_C], tl.float32)
    weighted_dyx = tl.zeros([BLOCK_C], tl.float32)
    for b in range(0, B):
        frame = b * T + t
        sum_dy = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        sum_dyx = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        for start in range(0, num_splits, BLOCK_P):
            split = start + tl.arange(0, BLOCK_P)
            mask = (split < num_splits)[:, None] & (c < C)[None, :]
            at = (frame * num_splits + split)[:, None] * C + c[None, :]
            sum_dy += tl.load(split_dy_ptr + at, mask=mask, other=0.0)
            sum_dyx += tl.load(split_dyx_ptr + at, mask=mask, other=0.0)
        frame_dy, frame_dyx = tl.sum(sum_dy, 0), tl.sum(sum_dyx, 0)
        tl.store(sums_ptr + frame * C + c, frame_dy, mask=c < C)
        tl.store(sums_ptr + (B * T + frame) * C + c, frame_dyx, mask=c < C)
        gain_row = b * gain_frames + t % gain_frames
        gain = tl.load(gain_ptr + gain_row * C + c, mask=c < C, other=0.0).to(tl.float32)
        weighted_dy += gain * frame_dy
        weighted_dyx += gain * frame_dyx
    tl.store(weighted_ptr + t * C + c, weighted_dy, mask=c < C)
    tl.store(weighted_ptr + (T + t) * C + c, weighted_dyx, mask=c < C)


@triton.jit
def dx_kernel(
    dy_ptr, x_ptr, gain_ptr, bias_ptr, mean_ptr, var_ptr, terms_ptr, dx_ptr,
    T, S, C, num_splits, split_rows, gain_frames, bias_frames,
    TERMS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx of one split; `terms` are the means of gain·dy·mask and of gain·dy·mask·x̂, [2, T, C]."""
    _, frame, first, last, c = own_split(S, num_splits, split_rows, BLOCK_C)
    bias, mean, rstd, scale = coefficients(
        gain_ptr, bias_ptr, mean_ptr, var_ptr, frame, c, T, C, gain_frames, bias_frames
    )
    if TERMS:
        t = frame % T
        offset = tl.load(terms_ptr + t * C + c, mask=c < C, other=0.0) * rstd
        slope = tl.load(terms_ptr + (T + t) * C + c, mask=c < C, other=0.0) * rstd * rstd
    dy_ptr += frame * S * C
    x_ptr += frame * S * C
    dx_ptr += frame * S * C

    for start in range(first, last, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        mask = (s < last)[:, None] & (c < C)[None, :]
        at = s[:, None] * C + c[None, :]
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        centred = x - mean[None, :]
        dy = tl.where(centred * scale[None, :] + bias[None, :] <= 0.0, 0.0, dy)
        dx = dy * scale[None, :]
        if TERMS:
            dx -= centred * slope[None, :] + offset[None, :]
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


class FramePrograms(NamedTuple):
    """How a [B, T, S, C] tensor is cut into programs."""

    block_s: int
    block_c: int
    split_rows: int
    num_splits: int
    streaming_grid: tuple[int, int]
    merging_grid: tuple[int, int]

    @property
    def tile(self) -> dict[str, int]:
        """The streaming kernels' configuration."""
        return {"BLOCK_S": self.block_s, "BLOCK_C": self.block_c, **OPTIONS}


@functools.cache
def plan(B: int, T: int, S: int, C: int) -> FramePrograms:
    """Raises ValueError for a frame of 2^31 values or more: offsets within a frame are int32."""
    if S * C >= 2**31:
        raise ValueError(f"a frame of {S} pixels x {C} channels has 2^31 values or more")
    block_c = channel_block(C)
    block_s = TILE // block_c
    channel_blocks, num_tiles = ceil_div(C, block_c), ceil_div(S, block_s)
    wanted_splits = ceil_div(WANTED_PROGRAMS, B * T * channel_blocks)
    most_splits = ceil_div(num_tiles, MIN_TILES)
    split_rows = ceil_div(num_tiles, min(wanted_splits, most_splits)) * block_s
    num_splits = ceil_div(S, split_rows)
    return FramePrograms(
        block_s=block_s,
        block_c=block_c,
        split_rows=split_rows,
        num_splits=num_splits,
        streaming_grid=(B * T * num_splits, channel_blocks),
        merging_grid=(T, ceil_div(C, MERGE_TILE["BLOCK_C"])),
    )


def channel_block(C: int) -> int:
    """Channels per tile: a divisor of C where one of 32 to 128 exists, so that no lane idles."""
    for block in (128, 64, 32):
        if C % block == 0:
            return block
    return min(128, next_power_of_2(C))


def moments(x_BTSC: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, each [T, C] fp32."""
    (B, T, S, C), cut = x_BTSC.shape, plan(*x_BTSC.shape)
    split_mean, split_square = x_BTSC.new_empty((2, B, T, cut.num_splits, C), dtype=torch.float32)
    mean_TC, var_TC = (x_BTSC.new_empty((T, C), dtype=torch.float32) for _ in range(2))
    moments_kernel[cut.streaming_grid](
        x_BTSC, split_mean, split_square, S, C, cut.num_splits, cut.split_rows, **cut.tile
    )
    merge_moments_kernel[cut.merging_grid](
        split_mean, split_square, mean_TC, var_TC,
        B, T, S, C, cut.num_splits, cut.split_rows, float(B * S), **MERGE_TILE, **OPTIONS,
    )  # fmt: skip
    return mean_TC, var_TC


def normalize(operands: NormOperands) -> Tensor:
    """y, [B, T, S, C] of the dtype of x."""
    y_BTSC = torch.empty_like(operands.x_BTSC)
    sizes, cut = _launch(operands)
    normalize_kernel[cut.streaming_grid](*operands, y_BTSC, *sizes, **cut.tile)
    return y_BTSC


def sums(dy_BTSC: Tensor, operands: NormOperands) -> tuple[Tensor, Tensor]:
    """(S1, S2) as [2, B, T, C] fp32, and Σ_b gain·(S1, S2) as [2, T, C] fp32."""
    x_BTSC, gain_BtC = operands.x_BTSC, operands.gain_BtC
    B, T, _, C = x_BTSC.shape
    sizes, cut = _launch(operands)
    split_dy, split_dyx = x_BTSC.new_empty((2, B, T, cut.num_splits, C), dtype=torch.float32)
    sums_2BTC = x_BTSC.new_empty((2, B, T, C), dtype=torch.float32)
    weighted_2TC = x_BTSC.new_empty((2, T, C), dtype=torch.float32)
    sums_kernel[cut.streaming_grid](dy_BTSC, *operands, split_dy, split_dyx, *sizes, **cut.tile)
    merge_sums_kernel[cut.merging_grid](
        split_dy, split_dyx, gain_BtC, sums_2BTC, weighted_2TC,
        B, T, C, cut.num_splits, gain_BtC.shape[1], **MERGE_TILE, **OPTIONS,
    )  # fmt: skip
    return sums_2BTC, weighted_2TC


def dx(dy_BTSC: Tensor, operands: NormOperands, terms_2TC: Tensor | None) -> Tensor:
    """dx, [B, T, S, C] of the dtype of x; `terms` None: the statistics do not depend on x."""
    dx_BTSC = torch.empty_like(operands.x_BTSC)
    sizes, cut = _launch(operands)
    dx_kernel[cut.streaming_grid](
        dy_BTSC, *operands, terms_2TC, dx_BTSC, *sizes, TERMS=terms_2TC is not None, **cut.tile
    )
    return dx_BTSC


def _launch(operands: NormOperands) -> tuple[tuple[int, ...], FramePrograms]:
    """T, S, C, splits, rows of a split, frames of gain and of bias; and the plan."""
    x_BTSC, gain_BtC, bias_BtC, _, _ = operands
    (_, T, S, C), cut = x_BTSC.shape, plan(*x_BTSC.shape)
    return (T, S, C, cut.num_splits, cut.split_rows, gain_BtC.shape[1], bias_BtC.shape[1]), cut
