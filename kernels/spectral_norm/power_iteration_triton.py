# mypy: allow-untyped-defs
"""Triton kernels of `kernels.power_iteration_`: see `kernels.spectral_norm.power_iteration_tables`.

All arithmetic is fp32.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from kernels.spectral_norm.power_iteration_tables import (
    ADDRESSES,
    COLUMN_TILE,
    ROW_TILE,
    SIZES,
    addresses,
    cut,
)

OPTIONS = {"num_warps": 4}
# Tiles of 2048 values: 16 per thread, four loads of 16 bytes under way.
COLUMN_SUMS = {"ROWS": COLUMN_TILE[0], "BLOCK_R": 8, "BLOCK_K": COLUMN_TILE[1]}
ROW_SUMS = {"COLUMNS": ROW_TILE[1], "BLOCK_R": ROW_TILE[0], "BLOCK_K": 128}
MERGE_COLUMNS = {"BLOCK_P": 8, "BLOCK_K": COLUMN_TILE[1]}
FINISH = {"BLOCK": 1024}
ADDRESS_COLUMNS = tl.constexpr(len(ADDRESSES))
SIZE_COLUMNS = tl.constexpr(len(SIZES))
COLUMN_BLOCK = tl.constexpr(COLUMN_TILE[1])
# As torch.nn.functional.normalize: a vector shorter than this is not blown up to length one.
SHORTEST = tl.constexpr(1e-12)


@triton.jit
def fp32_at(table_ptr, matrix, column: tl.constexpr):
    """A pointer from the table of addresses."""
    return tl.load(table_ptr + matrix * ADDRESS_COLUMNS + column).to(tl.pointer_type(tl.float32))


@triton.jit
def aligned_at(table_ptr, matrix, column: tl.constexpr, anchor_ptr):
    """As `fp32_at`, by way of a pointer that the compiler knows to be aligned to 16 bytes: a number
    tells it nothing, and it would not join four loads into one."""
    address = tl.load(table_ptr + matrix * ADDRESS_COLUMNS + column)
    return anchor_ptr + (address - anchor_ptr.to(tl.int64)) // 16 * 4


@triton.jit
def add_rows(
    w_ptr, u_ptr, R, K, first_row, k,
    ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Σ u[r]·W[r, k] over ROWS rows."""
    total = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for start in range(0, tl.minimum(ROWS, R - first_row), BLOCK_R):
        r = first_row + start + tl.arange(0, BLOCK_R)
        mask = (r < R)[:, None] & (k < K)[None, :]
        w = tl.load(w_ptr + r[:, None] * K + k[None, :], mask=mask, other=0.0)
        total += w * tl.load(u_ptr + r, mask=r < R, other=0.0)[:, None]
    return tl.sum(total, 0)


@triton.jit
def column_sums_kernel(
    table_ptr, sizes_ptr, work_ptr, workspace_ptr,
    ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Wᵀu over one split of rows, for one block of columns."""
    work_ptr += tl.program_id(0) * 3
    matrix = tl.load(work_ptr).to(tl.int64)
    split = tl.load(work_ptr + 1).to(tl.int64)
    k = tl.load(work_ptr + 2) * BLOCK_K + tl.arange(0, BLOCK_K)
    sizes_ptr += matrix * SIZE_COLUMNS
    R, K = tl.load(sizes_ptr), tl.load(sizes_ptr + 1)
    w_ptr, u_ptr = fp32_at(table_ptr, matrix, 0), fp32_at(table_ptr, matrix, 1)

    if tl.load(table_ptr + matrix * ADDRESS_COLUMNS + 3) != 0:
        w_ptr = aligned_at(table_ptr, matrix, 0, workspace_ptr)
        sums = add_rows(w_ptr, u_ptr, R, K // 4 * 4, split * ROWS, k, ROWS, BLOCK_R, BLOCK_K)
    else:
        sums = add_rows(w_ptr, u_ptr, R, K, split * ROWS, k, ROWS, BLOCK_R, BLOCK_K)
    workspace_ptr += tl.load(sizes_ptr + 4) + split * K
    tl.store(workspace_ptr + k, sums, mask=k < K)


@triton.jit
def add_splits(partial_ptr, num_splits, length, i, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr):
    """Σ over splits of [num_splits, length] partial sums, at places i."""
    total = tl.zeros([BLOCK_P, BLOCK], tl.float32)
    for start in range(0, num_splits, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < num_splits)[:, None] & (i < length)[None, :]
        total += tl.load(partial_ptr + p[:, None] * length + i[None, :], mask=mask, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def merge_columns_kernel(
    table_ptr, sizes_ptr, work_ptr, workspace_ptr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr
):
    """v' of one block of columns, and the sum of its squares."""
    work_ptr += tl.program_id(0) * 2
    matrix, block = tl.load(work_ptr).to(tl.int64), tl.load(work_ptr + 1)
    k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    sizes_ptr += matrix * SIZE_COLUMNS
    K, num_splits = tl.load(sizes_ptr + 1), tl.load(sizes_ptr + 2)
    columns_ptr = workspace_ptr + tl.load(sizes_ptr + 4)
    v = add_splits(columns_ptr, num_splits, K, k, BLOCK_P, BLOCK_K)
    tl.store(fp32_at(table_ptr, matrix, 2) + k, v, mask=k < K)
    squares_ptr = workspace_ptr + tl.load(sizes_ptr + 5)
    tl.store(squares_ptr + block, tl.sum(v * v, 0))


@triton.jit
def add_columns(
    w_ptr, v_ptr, R, K, r, first_column,
    COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Σ W[r, k]·v[k] over COLUMNS columns."""
    total = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for start in range(0, tl.minimum(COLUMNS, K - first_column), BLOCK_K):
        k = first_column + start + tl.arange(0, BLOCK_K)
        mask = (r < R)[:, None] & (k < K)[None, :]
        w = tl.load(w_ptr + r[:, None] * K + k[None, :], mask=mask, other=0.0)
        total += w * tl.load(v_ptr + k, mask=k < K, other=0.0)[None, :]
    return tl.sum(total, 1)


@triton.jit
def row_sums_kernel(
    table_ptr, sizes_ptr, work_ptr, workspace_ptr,
    COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Wv' over one split of columns, for one block of rows."""
    work_ptr += tl.program_id(0) * 3
    matrix = tl.load(work_ptr).to(tl.int64)
    r = tl.load(work_ptr + 1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.load(work_ptr + 2)
    sizes_ptr += matrix * SIZE_COLUMNS
    R, K = tl.load(sizes_ptr), tl.load(sizes_ptr + 1)
    w_ptr, v_ptr = fp32_at(table_ptr, matrix, 0), fp32_at(table_ptr, matrix, 2)

    if tl.load(table_ptr + matrix * ADDRESS_COLUMNS + 3) != 0:
        w_ptr = aligned_at(table_ptr, matrix, 0, workspace_ptr)
        sums = add_columns(
            w_ptr, v_ptr, R, K // 4 * 4, r, split * COLUMNS,
            COLUMNS, BLOCK_R, BLOCK_K,
        )  # fmt: skip
    else:
        sums = add_columns(w_ptr, v_ptr, R, K, r, split * COLUMNS, COLUMNS, BLOCK_R, BLOCK_K)
    workspace_ptr += tl.load(sizes_ptr + 6) + split * R
    tl.store(workspace_ptr + r, sums, mask=r < R)


@triton.jit
def finish_kernel(table_ptr, sizes_ptr, workspace_ptr, sigma_ptr, BLOCK: tl.constexpr):
    """v, u and σ of one matrix, from v', |v'|² by blocks and Wv' by splits."""
    matrix = tl.program_id(0).to(tl.int64)
    sizes_ptr += matrix * SIZE_COLUMNS
    R, K = tl.load(sizes_ptr), tl.load(sizes_ptr + 1)
    num_splits = tl.load(sizes_ptr + 3)
    squares_ptr = workspace_ptr + tl.load(sizes_ptr + 5)
    rows_ptr = workspace_ptr + tl.load(sizes_ptr + 6)
    u_ptr, v_ptr = fp32_at(table_ptr, matrix, 1), fp32_at(table_ptr, matrix, 2)
    lane = tl.arange(0, BLOCK)

    num_blocks = tl.cdiv(K, COLUMN_BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_blocks, BLOCK):
        i = start + lane
        squares += tl.load(squares_ptr + i, mask=i < num_blocks, other=0.0)
    v_scale = 1.0 / at_least_shortest(tl.sqrt_rn(tl.sum(squares, 0)))
    for start in range(0, K, BLOCK):
        k = start + lane
        v = tl.load(v_ptr + k, mask=k < K, other=0.0)
        tl.store(v_ptr + k, v * v_scale, mask=k < K)

    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, R, BLOCK):
        u = add_splits(rows_ptr, num_splits, R, start + lane, 1, BLOCK) * v_scale
        squares += u * u
    square = tl.sum(squares, 0)
    length = at_least_shortest(tl.sqrt_rn(square))
    for start in range(0, R, BLOCK):
        r = start + lane
        u = add_splits(rows_ptr, num_splits, R, r, 1, BLOCK) * v_scale
        tl.store(u_ptr + r, u / length, mask=r < R)
    tl.store(sigma_ptr + matrix, square / length)  # u·Wv with u = Wv / length


@triton.jit
def at_least_shortest(length):
    """Not tl.maximum, which drops NaN."""
    return tl.where(length < SHORTEST, SHORTEST, length)


def power_iteration(
    weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], num_iterations: int
) -> Tensor:
    """σ [L]; u and v in place. Contiguous fp32 tensors."""
    shapes = tuple((weight.shape[0], weight[0].numel()) for weight in weights)
    work = cut(shapes, weights[0].device)
    table = addresses(weights, us, vs)
    workspace = weights[0].new_empty(work.workspace_values)
    sigma_L = weights[0].new_empty(len(weights))
    shared = table, work.sizes
    for _ in range(num_iterations):
        column_sums_kernel[(len(work.column_sums),)](
            *shared, work.column_sums, workspace, **COLUMN_SUMS, **OPTIONS
        )
        merge_columns_kernel[(len(work.merge_columns),)](
            *shared, work.merge_columns, workspace, **MERGE_COLUMNS, **OPTIONS
        )
        row_sums_kernel[(len(work.row_sums),)](
            *shared, work.row_sums, workspace, **ROW_SUMS, **OPTIONS
        )
        finish_kernel[(len(weights),)](*shared, workspace, sigma_L, **FINISH, **OPTIONS)
    return sigma_L
