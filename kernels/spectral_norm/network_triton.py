# mypy: allow-untyped-defs
"""Triton kernels of `kernels.spectral_normalize_all`: see `kernels.spectral_norm.network_tables`.

All arithmetic is fp32. Where rows are aligned, pointers are multiples of 16 bytes from an argument
that the compiler knows to be aligned: an address from a table tells it nothing, and it would not
join four loads into one.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.convolution.folding import Fold, folded_shape
from kernels.spectral_norm.network_tables import (
    ADDRESSES,
    MOST_SOURCES,
    PIECE,
    SIZES,
    NetworkTables,
    addresses,
    cut,
)

OPTIONS = {"num_warps": 4}
# Tiles of 2048 values: 16 per thread, four loads of 16 bytes under way.
TILE = {"ROWS": PIECE[0], "BLOCK_R": 16, "BLOCK_I": PIECE[1]}
SUMS = {"BLOCK_P": 512}
ADDRESS_COLUMNS = tl.constexpr(len(ADDRESSES))
SIZE_COLUMNS = tl.constexpr(len(SIZES))
SOURCE_COLUMNS = tl.constexpr(1 + MOST_SOURCES)


@triton.jit
def own_piece(work_ptr, ROWS: tl.constexpr, BLOCK_I: tl.constexpr):
    """This program's weight, first row and tap, int64, and its columns of that tap."""
    work_ptr += tl.program_id(0).to(tl.int64) * 4
    weight = tl.load(work_ptr).to(tl.int64)
    first_row = tl.load(work_ptr + 1).to(tl.int64) * ROWS
    tap = tl.load(work_ptr + 2).to(tl.int64)
    return weight, first_row, tap, tl.load(work_ptr + 3) * BLOCK_I + tl.arange(0, BLOCK_I)


@triton.jit
def plain_at(table_ptr, weight, column: tl.constexpr, anchor_ptr):
    """A pointer from the table of addresses, of the anchor's type."""
    address = tl.load(table_ptr + weight * ADDRESS_COLUMNS + column)
    return address.to(tl.pointer_type(anchor_ptr.dtype.element_ty))


@triton.jit
def aligned_at(table_ptr, weight, column: tl.constexpr, anchor_ptr):
    """The same as a multiple of 16 bytes from the anchor."""
    address = tl.load(table_ptr + weight * ADDRESS_COLUMNS + column)
    values: tl.constexpr = 128 // anchor_ptr.dtype.element_ty.primitive_bitwidth
    return anchor_ptr + (address - anchor_ptr.to(tl.int64)) // 16 * values


@triton.jit
def add_partial(partial_ptr, sizes_ptr, BLOCK_P: tl.constexpr):
    """The sum of all partial sums of a weight, in one order in every program."""
    partial_ptr += tl.load(sizes_ptr + 4)
    count = tl.load(sizes_ptr + 5)
    total = tl.zeros([BLOCK_P], tl.float32)
    for start in range(0, count, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        total += tl.load(partial_ptr + p, mask=p < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def add_taps(from_ptr, low_ptr, low, sources_ptr, columns, run, r, i, mask):
    """A tile of the sum of the taps that are listed, of one of two pointers: fp32 or 16 bits."""
    total = tl.zeros(mask.shape, tl.float32)
    for n in range(1, 1 + tl.load(sources_ptr)):
        tap = tl.load(sources_ptr + n).to(tl.int64)
        at = r[:, None] * columns + (tap * run + i)[None, :]
        if low:
            total += tl.load(low_ptr + at, mask=mask, other=0.0).to(tl.float32)
        else:
            total += tl.load(from_ptr + at, mask=mask, other=0.0)
    return total


@triton.jit
def add_rows(
    w_ptr, u_ptr, columns, run, tap, R, first_row, i,
    ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Σ u[r]·W[r, tap, i] over ROWS rows."""
    total = tl.zeros([BLOCK_R, BLOCK_I], tl.float32)
    for start in range(0, tl.minimum(ROWS, R - first_row), BLOCK_R):
        r = first_row + start + tl.arange(0, BLOCK_R)
        mask = (r < R)[:, None] & (i < run)[None, :]
        w = tl.load(w_ptr + r[:, None] * columns + (tap * run + i)[None, :], mask=mask, other=0.0)
        total += w * tl.load(u_ptr + r, mask=r < R, other=0.0)[:, None]
    return tl.sum(total, 0)


@triton.jit
def sigma_kernel(
    table_ptr, sizes_ptr, work_ptr, partial_ptr,
    ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Σ u[r]·W[r, k]·v[k] of one piece."""
    weight, first_row, tap, i = own_piece(work_ptr, ROWS, BLOCK_I)
    sizes_ptr += weight * SIZE_COLUMNS
    R, run, taps = tl.load(sizes_ptr), tl.load(sizes_ptr + 1), tl.load(sizes_ptr + 2)
    u_ptr = plain_at(table_ptr, weight, 1, partial_ptr)
    v_ptr = plain_at(table_ptr, weight, 2, partial_ptr) + tap * run
    if tl.load(table_ptr + weight * ADDRESS_COLUMNS + 5) != 0:
        w_ptr, fours = aligned_at(table_ptr, weight, 0, partial_ptr), run // 4 * 4
        sums = add_rows(
            w_ptr, u_ptr, taps * fours, fours, tap, R, first_row, i, ROWS, BLOCK_R, BLOCK_I
        )
    else:
        w_ptr = plain_at(table_ptr, weight, 0, partial_ptr)
        sums = add_rows(w_ptr, u_ptr, taps * run, run, tap, R, first_row, i, ROWS, BLOCK_R, BLOCK_I)
    v = tl.load(v_ptr + i, mask=i < run, other=0.0)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(sums * v, 0))


@triton.jit
def write_rows(
    w_ptr, y_ptr, low_ptr, low, sources_ptr, columns, kernel_columns, run, tap, R, first_row, i,
    divisor,
    ROWS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """fold(W) / σ of ROWS rows in one tap of the kernel."""
    for start in range(0, tl.minimum(ROWS, R - first_row), BLOCK_R):
        r = first_row + start + tl.arange(0, BLOCK_R)
        mask = (r < R)[:, None] & (i < run)[None, :]
        y = add_taps(w_ptr, w_ptr, False, sources_ptr, columns, run, r, i, mask) / divisor
        at = r[:, None] * kernel_columns + (tap * run + i)[None, :]
        if low:
            tl.store(low_ptr + at, y.to(low_ptr.dtype.element_ty), mask=mask)
        else:
            tl.store(y_ptr + at, y, mask=mask)


@triton.jit
def normalize_kernel(
    table_ptr, sizes_ptr, sources_ptr, work_ptr, partial_ptr, low_ptr, sigma_ptr,
    ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """σ, and fold(W) / σ of one piece of a kernel, of fp32 or of the dtype of `low_ptr`."""
    weight, first_row, tap, i = own_piece(work_ptr, ROWS, BLOCK_I)
    sizes_ptr += weight * SIZE_COLUMNS
    R, run = tl.load(sizes_ptr), tl.load(sizes_ptr + 1)
    taps, kernel_taps = tl.load(sizes_ptr + 2), tl.load(sizes_ptr + 3)
    sources_ptr += (tl.load(sizes_ptr + 6) + tap) * SOURCE_COLUMNS
    divisor, low = tl.load(sizes_ptr + 8).to(tl.float32), tl.load(sizes_ptr + 9) != 0
    sigma = add_partial(partial_ptr, sizes_ptr, BLOCK_P)
    if (first_row == 0) & (tap == 0):  # every block of columns: the same number
        tl.store(sigma_ptr + weight, sigma)
    divisor *= sigma  # a power of two by σ: as exact as one after the other
    if tl.load(table_ptr + weight * ADDRESS_COLUMNS + 5) != 0:
        fours = run // 4 * 4
        write_rows(
            aligned_at(table_ptr, weight, 0, partial_ptr),
            aligned_at(table_ptr, weight, 3, partial_ptr),
            aligned_at(table_ptr, weight, 3, low_ptr), low, sources_ptr,
            taps * fours, kernel_taps * fours, fours, tap, R, first_row, i, divisor,
            ROWS, BLOCK_R,
        )  # fmt: skip
    else:
        write_rows(
            plain_at(table_ptr, weight, 0, partial_ptr),
            plain_at(table_ptr, weight, 3, partial_ptr),
            plain_at(table_ptr, weight, 3, low_ptr), low, sources_ptr,
            taps * run, kernel_taps * run, run, tap, R, first_row, i, divisor,
            ROWS, BLOCK_R,
        )  # fmt: skip


@triton.jit
def multiply_rows(
    dy_ptr, low_ptr, low, w_ptr, sources_ptr, columns, kernel_columns, run, tap, R, first_row, i,
    ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Σ unfold(dK)[r, tap, i]·W[r, tap, i] over ROWS rows, but for the divisor."""
    total = tl.zeros([BLOCK_R, BLOCK_I], tl.float32)
    for start in range(0, tl.minimum(ROWS, R - first_row), BLOCK_R):
        r = first_row + start + tl.arange(0, BLOCK_R)
        mask = (r < R)[:, None] & (i < run)[None, :]
        dy = add_taps(dy_ptr, low_ptr, low, sources_ptr, kernel_columns, run, r, i, mask)
        at = r[:, None] * columns + (tap * run + i)[None, :]
        total += dy * tl.load(w_ptr + at, mask=mask, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def inner_kernel(
    table_ptr, sizes_ptr, sources_ptr, work_ptr, partial_ptr, low_ptr,
    ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """⟨unfold(dK), W⟩ of one piece, dK of fp32 or of the dtype of `low_ptr`."""
    weight, first_row, tap, i = own_piece(work_ptr, ROWS, BLOCK_I)
    sizes_ptr += weight * SIZE_COLUMNS
    R, run = tl.load(sizes_ptr), tl.load(sizes_ptr + 1)
    taps, kernel_taps = tl.load(sizes_ptr + 2), tl.load(sizes_ptr + 3)
    sources_ptr += (tl.load(sizes_ptr + 7) + tap) * SOURCE_COLUMNS
    divisor, low = tl.load(sizes_ptr + 8).to(tl.float32), tl.load(sizes_ptr + 9) != 0
    if tl.load(table_ptr + weight * ADDRESS_COLUMNS + 5) != 0:
        fours = run // 4 * 4
        sums = multiply_rows(
            aligned_at(table_ptr, weight, 3, partial_ptr),
            aligned_at(table_ptr, weight, 3, low_ptr), low,
            aligned_at(table_ptr, weight, 0, partial_ptr), sources_ptr,
            taps * fours, kernel_taps * fours, fours, tap, R, first_row, i,
            ROWS, BLOCK_R, BLOCK_I,
        )  # fmt: skip
    else:
        sums = multiply_rows(
            plain_at(table_ptr, weight, 3, partial_ptr),
            plain_at(table_ptr, weight, 3, low_ptr), low,
            plain_at(table_ptr, weight, 0, partial_ptr), sources_ptr,
            taps * run, kernel_taps * run, run, tap, R, first_row, i,
            ROWS, BLOCK_R, BLOCK_I,
        )  # fmt: skip
    tl.store(partial_ptr + tl.program_id(0), tl.sum(sums, 0) / divisor)


@triton.jit
def write_gradients(
    dy_ptr, low_ptr, low, dw_ptr, sources_ptr, u_ptr, columns, kernel_columns, run, tap,
    R, first_row, i, v_inner, sigma, share,
    ROWS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dW of ROWS rows in one tap of the weight."""
    for start in range(0, tl.minimum(ROWS, R - first_row), BLOCK_R):
        r = first_row + start + tl.arange(0, BLOCK_R)
        mask = (r < R)[:, None] & (i < run)[None, :]
        dy = add_taps(dy_ptr, low_ptr, low, sources_ptr, kernel_columns, run, r, i, mask) * share
        u = tl.load(u_ptr + r, mask=r < R, other=0.0)
        at = r[:, None] * columns + (tap * run + i)[None, :]
        tl.store(dw_ptr + at, (dy - u[:, None] * v_inner[None, :]) / sigma, mask=mask)


@triton.jit
def dw_kernel(
    table_ptr, sizes_ptr, sources_ptr, work_ptr, partial_ptr, low_ptr, sigma_ptr,
    ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """(unfold(dK) - ⟨unfold(dK), Ŵ⟩ u vᵀ) / σ of one piece."""
    weight, first_row, tap, i = own_piece(work_ptr, ROWS, BLOCK_I)
    sizes_ptr += weight * SIZE_COLUMNS
    R, run = tl.load(sizes_ptr), tl.load(sizes_ptr + 1)
    taps, kernel_taps = tl.load(sizes_ptr + 2), tl.load(sizes_ptr + 3)
    sources_ptr += (tl.load(sizes_ptr + 7) + tap) * SOURCE_COLUMNS
    share, low = 1.0 / tl.load(sizes_ptr + 8).to(tl.float32), tl.load(sizes_ptr + 9) != 0
    sigma = tl.load(sigma_ptr + weight)
    inner = add_partial(partial_ptr, sizes_ptr, BLOCK_P) / sigma
    u_ptr = plain_at(table_ptr, weight, 1, partial_ptr)
    v_ptr = plain_at(table_ptr, weight, 2, partial_ptr) + tap * run
    v_inner = tl.load(v_ptr + i, mask=i < run, other=0.0) * inner
    if tl.load(table_ptr + weight * ADDRESS_COLUMNS + 5) != 0:
        fours = run // 4 * 4
        write_gradients(
            aligned_at(table_ptr, weight, 3, partial_ptr),
            aligned_at(table_ptr, weight, 3, low_ptr), low,
            aligned_at(table_ptr, weight, 4, partial_ptr), sources_ptr, u_ptr,
            taps * fours, kernel_taps * fours, fours, tap, R, first_row, i, v_inner, sigma, share,
            ROWS, BLOCK_R,
        )  # fmt: skip
    else:
        write_gradients(
            plain_at(table_ptr, weight, 3, partial_ptr),
            plain_at(table_ptr, weight, 3, low_ptr), low,
            plain_at(table_ptr, weight, 4, partial_ptr), sources_ptr, u_ptr,
            taps * run, kernel_taps * run, run, tap, R, first_row, i, v_inner, sigma, share,
            ROWS, BLOCK_R,
        )  # fmt: skip


def normalize(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    folds: Sequence[Fold],
) -> tuple[list[Tensor], Tensor]:
    """(fold(W) / σ of every weight in its dtype, σ [L]); contiguous fp32 in."""
    work = _cut(weights, dtypes, folds)
    kernels = [
        weight.new_empty(folded_shape(tuple(weight.shape), how), dtype=dtype)
        for weight, dtype, how in zip(weights, dtypes, folds, strict=True)
    ]
    table = addresses(weights, us, vs, kernels)
    partial = weights[0].new_empty(len(work.weight_pieces))
    sigma_L = weights[0].new_empty(len(weights))
    low = _anchor(weights[0], dtypes)
    shared = table, work.sizes
    sigma_kernel[(len(work.weight_pieces),)](
        *shared, work.weight_pieces, partial, **TILE, **OPTIONS
    )
    normalize_kernel[(len(work.kernel_pieces),)](
        *shared, work.sources, work.kernel_pieces, partial, low, sigma_L, **TILE, **SUMS, **OPTIONS
    )
    return kernels, sigma_L


def gradients(
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    sigma_L: Tensor,
    folds: Sequence[Fold],
) -> list[Tensor]:
    """dW of every weight, fp32; contiguous fp32 in, dK fp32 or of one dtype of 16 bits."""
    dtypes = [dy.dtype for dy in dys]
    work = _cut(weights, dtypes, folds)
    dws = [torch.empty_like(weight) for weight in weights]
    table = addresses(weights, us, vs, dys, dws)
    partial = weights[0].new_empty(len(work.weight_pieces))
    low = _anchor(weights[0], dtypes)
    shared = table, work.sizes, work.sources, work.weight_pieces, partial, low
    grid = (len(work.weight_pieces),)
    inner_kernel[grid](*shared, **TILE, **OPTIONS)
    dw_kernel[grid](*shared, sigma_L, **TILE, **SUMS, **OPTIONS)
    return dws


def _cut(
    weights: Sequence[Tensor], dtypes: Sequence[torch.dtype], folds: Sequence[Fold]
) -> NetworkTables:
    shapes = tuple(tuple(weight.shape) for weight in weights)
    lows = tuple(dtype != torch.float32 for dtype in dtypes)
    return cut(shapes, tuple(folds), lows, weights[0].device)


def _anchor(like: Tensor, dtypes: Sequence[torch.dtype]) -> Tensor:
    """Aligned memory of the dtype of 16 bits, which nothing reads; fp32 where there is none."""
    low = next((dtype for dtype in dtypes if dtype != torch.float32), torch.float32)
    return like.new_empty(1, dtype=low)
