# mypy: allow-untyped-defs
"""Triton kernels of `kernels.spectral_normalize`, W / σ of one weight and its gradient.

Each is two launches of the same programs, which own a run of rows in a block of columns. In the
first they leave a partial sum each, of σ = uᵀWv or of ⟨dŴ, W⟩; in the second every one of them adds
up all partial sums, in one and the same order, and finishes its own rows. A weight that fits in the
L2 cache comes from memory once. All arithmetic is fp32.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.tiling import ceil_div, next_power_of_2

OPTIONS = {"num_warps": 4}
# 16 values per thread: four loads of 16 bytes under way.
TILE = 2048
# Rereading all partial sums must be little beside a program's own tiles.
MIN_TILES, MOST_PROGRAMS = 8, 1024


@triton.jit
def own_rows(R, rows_per_program, column_blocks, BLOCK_K: tl.constexpr):
    """This program's first row (int64) and end row, and its columns."""
    index = tl.program_id(0)
    first = (index // column_blocks).to(tl.int64) * rows_per_program
    k = index % column_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    return first, tl.minimum(first + rows_per_program, R), k


@triton.jit
def sum_all(partial_ptr, num_partial, BLOCK_P: tl.constexpr):
    """The sum of all programs' partial sums, in one order in every program."""
    p = tl.arange(0, BLOCK_P)
    return tl.sum(tl.load(partial_ptr + p, mask=p < num_partial, other=0.0), 0)


@triton.jit
def sigma_kernel(
    w_ptr, u_ptr, v_ptr, partial_ptr, R, K, rows_per_program, column_blocks,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Σ u[r]·W[r, k]·v[k] of one program's rows and columns."""
    first, last, k = own_rows(R, rows_per_program, column_blocks, BLOCK_K)
    total = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for start in range(first, last, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        mask = (r < last)[:, None] & (k < K)[None, :]
        w = tl.load(w_ptr + r[:, None] * K + k[None, :], mask=mask, other=0.0)
        total += w * tl.load(u_ptr + r, mask=r < last, other=0.0)[:, None]
    v = tl.load(v_ptr + k, mask=k < K, other=0.0)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.sum(total, 0) * v, 0))


@triton.jit
def normalize_kernel(
    w_ptr, partial_ptr, sigma_ptr, y_ptr, R, K, rows_per_program, column_blocks, num_partial,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """σ, and W / σ of one program's rows and columns."""
    first, last, k = own_rows(R, rows_per_program, column_blocks, BLOCK_K)
    sigma = sum_all(partial_ptr, num_partial, BLOCK_P)
    if tl.program_id(0) == 0:
        tl.store(sigma_ptr, sigma)
    for start in range(first, last, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        mask = (r < last)[:, None] & (k < K)[None, :]
        at = r[:, None] * K + k[None, :]
        y = tl.load(w_ptr + at, mask=mask, other=0.0) / sigma
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def inner_kernel(
    dy_ptr, w_ptr, partial_ptr, R, K, rows_per_program, column_blocks,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Σ dŴ[r, k]·W[r, k] of one program's rows and columns."""
    first, last, k = own_rows(R, rows_per_program, column_blocks, BLOCK_K)
    total = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for start in range(first, last, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        mask = (r < last)[:, None] & (k < K)[None, :]
        at = r[:, None] * K + k[None, :]
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        total += dy * tl.load(w_ptr + at, mask=mask, other=0.0)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.sum(total, 0), 0))


@triton.jit
def dw_kernel(
    dy_ptr, u_ptr, v_ptr, sigma_ptr, partial_ptr, dw_ptr,
    R, K, rows_per_program, column_blocks, num_partial,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """(dŴ - ⟨dŴ, Ŵ⟩ u vᵀ) / σ of one program's rows and columns."""
    first, last, k = own_rows(R, rows_per_program, column_blocks, BLOCK_K)
    sigma = tl.load(sigma_ptr)
    inner = sum_all(partial_ptr, num_partial, BLOCK_P) / sigma
    v = tl.load(v_ptr + k, mask=k < K, other=0.0) * inner
    for start in range(first, last, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        mask = (r < last)[:, None] & (k < K)[None, :]
        at = r[:, None] * K + k[None, :]
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(u_ptr + r, mask=r < last, other=0.0)
        tl.store(dw_ptr + at, (dy - u[:, None] * v[None, :]) / sigma, mask=mask)


class MatrixPrograms(NamedTuple):
    """How one matrix [R, K] is cut into programs."""

    grid: tuple[int]
    arguments: tuple[int, int, int, int]  # R, K, rows per program, blocks of columns
    tile: dict[str, int]

    @property
    def all_partial(self) -> dict[str, int]:
        """The tile, for kernels that add up all partial sums."""
        return self.tile | {"BLOCK_P": MOST_PROGRAMS}


def plan(R: int, K: int) -> MatrixPrograms:
    """Eight tiles per program, more where there would be more than 1024 programs otherwise.

    One program for each block of columns is the least; past 2^18 columns, which no weight of a
    video GAN comes near, that raises ValueError.
    """
    block_k = min(256, next_power_of_2(K))
    block_r = TILE // block_k
    column_blocks = ceil_div(K, block_k)
    if column_blocks > MOST_PROGRAMS:
        raise ValueError(f"a matrix of {K} columns; {MOST_PROGRAMS * block_k} are the most")
    row_tiles = ceil_div(R, block_r)
    tiles_each = max(MIN_TILES, ceil_div(row_tiles, MOST_PROGRAMS // column_blocks))
    rows_each = tiles_each * block_r
    return MatrixPrograms(
        grid=(column_blocks * ceil_div(R, rows_each),),
        arguments=(R, K, rows_each, column_blocks),
        tile={"BLOCK_R": block_r, "BLOCK_K": block_k} | OPTIONS,
    )


def normalize(
    weight: Tensor, u_R: Tensor, v_K: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(W / σ in `dtype`, σ); contiguous fp32 in."""
    grid, arguments, tile = pieces = plan(weight.shape[0], weight[0].numel())
    partial = weight.new_empty(grid)
    sigma = weight.new_empty(())
    y = torch.empty_like(weight, dtype=dtype)
    sigma_kernel[grid](weight, u_R, v_K, partial, *arguments, **tile)
    normalize_kernel[grid](weight, partial, sigma, y, *arguments, *grid, **pieces.all_partial)
    return y, sigma


def gradient(dy: Tensor, weight: Tensor, u_R: Tensor, v_K: Tensor, sigma: Tensor) -> Tensor:
    """dW, fp32; contiguous fp32 in, dŴ of any dtype."""
    grid, arguments, tile = pieces = plan(weight.shape[0], weight[0].numel())
    partial = weight.new_empty(grid)
    dw = torch.empty_like(weight)
    inner_kernel[grid](dy, weight, partial, *arguments, **tile)
    dw_kernel[grid](dy, u_R, v_K, sigma, partial, dw, *arguments, *grid, **pieces.all_partial)
    return dw
