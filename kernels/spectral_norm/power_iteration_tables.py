"""How a power iteration over a list of matrices is cut into programs on a GPU.

One iteration is four launches whatever the number of matrices, each over all of them:

    column sums    W → Wᵀu of every split of rows           [row_splits, K] partial sums
    merge columns  → v' = Wᵀu, |v'|² of every block of columns
    row sums       W, v' → Wv' of every split of columns    [column_splits, R] partial sums
    finish         → v = v' / |v'|, u = Wv / |Wv|, σ = uᵀWv

A program finds its piece of work in a list, its matrix's sizes and addresses in two tables. Lists
and sizes depend on the shapes alone, so they are made once; so does the order of every sum, and
the same weights give the same bits. Nothing is added atomically.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Rows and columns of W that a program of the column sums reads, and of the row sums: 128 KiB. The
# partial sums it leaves are 1/128 of that or less.
COLUMN_TILE = (128, 256)
ROW_TILE = (16, 2048)
ALIGNMENT = 16  # bytes; rows that all begin at a multiple of it are read four values at a time

# Columns of the tables.
ADDRESSES = ("W", "u", "v", "aligned")
SIZES = ("R", "K", "row_splits", "column_splits", "columns_at", "squares_at", "rows_at")


class IterationTables(NamedTuple):
    """The work of each launch: rows of a list, each telling what one program does."""

    sizes: Tensor  # [L, 7] int64; "*_at" are offsets in the workspace, in values
    column_sums: Tensor  # [programs, 3] int32: matrix, split of rows, block of columns
    merge_columns: Tensor  # [programs, 2] int32: matrix, block of columns
    row_sums: Tensor  # [programs, 3] int32: matrix, block of rows, split of columns
    workspace_values: int  # fp32 values


@functools.lru_cache(maxsize=32)
def cut(shapes: tuple[tuple[int, int], ...], device: torch.device) -> IterationTables:
    """The cut of matrices [R, K] of these shapes."""
    sizes: list[tuple[int, ...]] = []
    column_sums: list[tuple[int, ...]] = []
    merge_columns: list[tuple[int, ...]] = []
    row_sums: list[tuple[int, ...]] = []
    at = 0
    for index, (R, K) in enumerate(shapes):
        row_splits, column_blocks = _tiles(R, K, COLUMN_TILE)
        row_blocks, column_splits = _tiles(R, K, ROW_TILE)
        columns_at, squares_at = at, at + row_splits * K
        rows_at = squares_at + column_blocks
        at = rows_at + column_splits * R
        sizes.append((R, K, row_splits, column_splits, columns_at, squares_at, rows_at))
        column_sums += itertools.product([index], range(row_splits), range(column_blocks))
        merge_columns += itertools.product([index], range(column_blocks))
        row_sums += itertools.product([index], range(row_blocks), range(column_splits))

    def table(rows: list[tuple[int, ...]], dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(rows, dtype=dtype, device=device)

    return IterationTables(
        table(sizes, torch.int64), table(column_sums), table(merge_columns), table(row_sums), at
    )


def _tiles(R: int, K: int, tile: tuple[int, int]) -> tuple[int, int]:
    return -(-R // tile[0]), -(-K // tile[1])


def addresses(weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor]) -> Tensor:
    """[L, 4] int64: addresses of W, u and v, and whether every row of W is aligned.

    Copied to the device only when an address is not what it was in some earlier call.
    """
    rows = tuple(
        (weight.data_ptr(), u.data_ptr(), v.data_ptr(), int(_rows_are_aligned(weight)))
        for weight, u, v in zip(weights, us, vs, strict=True)
    )
    return _address_table(rows, weights[0].device)


def _rows_are_aligned(weight: Tensor) -> bool:
    row_bytes = weight[0].numel() * weight.element_size()
    return weight.data_ptr() % ALIGNMENT == 0 and row_bytes % ALIGNMENT == 0


@functools.lru_cache(maxsize=32)
def _address_table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=device)
