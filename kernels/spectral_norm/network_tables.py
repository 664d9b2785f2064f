"""How W / σ of a list of weights is cut into programs, two launches whatever their number.

Forward     sigma      → a partial sum of uᵀWv of every piece of a weight
            normalize  → σ; fold(W) / σ of every piece of a kernel
Backward    inner      → a partial sum of ⟨unfold(dŴ), W⟩ of every piece of a weight
            dw         → dW of every piece of a weight

A weight is [R, taps, I]. The kernel that it is folded into has more taps; a weight that is not
folded is one tap of all its K columns. A piece is a run of rows in a block of the columns of one
tap. A table says which taps of the weight add up to a tap of the kernel, up to eight, and what
divides the sum; `kernels.convolution.folding` fills it.

Work and tables depend on the shapes alone, so they are made once, and so is the order of every sum.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.convolution.folding import Fold, fold

# Rows and columns that a program reads: 128 KiB of W. Its one partial sum is read again by all the
# programs of its weight: 576 numbers for the largest of a paper's networks.
PIECE = (256, 128)
ALIGNMENT = 16  # bytes; rows that all begin at a multiple of it are read four values at a time
MOST_SOURCES = 8  # the taps of a 2 x 2 x 2 box

# Columns of the tables. "Kernel" is Ŵ, and dŴ in the backward pass.
ADDRESSES = ("W", "u", "v", "kernel", "dW", "aligned")
SIZES = (
    "R", "run", "taps", "kernel_taps", "partial_at", "num_partial", "fold_at", "unfold_at",
    "divisor", "low",
)  # fmt: skip


class NetworkTables(NamedTuple):
    """The work of each launch: rows of a list, each telling what one program does."""

    sizes: Tensor  # [L, 10] int64; "*_at" are rows in `sources` and a place among the partial sums
    sources: Tensor  # [taps of all folds, 1 + 8] int32: how many taps are added, and which
    weight_pieces: Tensor  # [programs, 4] int32: weight, run of rows, tap, block of columns
    kernel_pieces: Tensor  # [programs, 4] int32


class Taps(NamedTuple):
    """One way to fold: of which taps every tap is the sum."""

    fold: list[list[int]]  # for every tap of the kernel, taps of the weight
    unfold: list[list[int]]  # the other way round
    divisor: int


@functools.lru_cache(maxsize=64)
def taps_of(taps: tuple[int, ...], how: Fold) -> Taps:
    """Read off the kernels that single taps are folded into."""
    num_taps = math.prod(taps)
    each = torch.eye(num_taps, device="cpu").view(num_taps, *taps, 1)
    matrix = fold(each, how).flatten(1)  # [taps of the weight, taps of the kernel]
    divisor = round(1 / matrix.max().item())
    if not torch.equal(matrix * divisor, (matrix != 0).float()) or divisor & (divisor - 1):
        raise AssertionError(f"folding {how} is not a sum of taps over a power of two")
    return Taps(
        [column.nonzero().flatten().tolist() for column in matrix.T],
        [row.nonzero().flatten().tolist() for row in matrix],
        divisor,
    )


@functools.lru_cache(maxsize=32)
def cut(
    shapes: tuple[tuple[int, ...], ...],
    folds: tuple[Fold, ...],
    lows: tuple[bool, ...],
    device: torch.device,
) -> NetworkTables:
    """The cut of weights of these shapes; `lows` says which kernels are of 16 bits."""
    sizes: list[tuple[int, ...]] = []
    sources: list[list[int]] = []
    weight_pieces: list[tuple[int, ...]] = []
    kernel_pieces: list[tuple[int, ...]] = []
    for index, (shape, how, low) in enumerate(zip(shapes, folds, lows, strict=True)):
        R, run = shape[0], shape[-1] if how else math.prod(shape[1:])
        taps = taps_of(shape[1:-1] if how else (), how)
        splits, blocks = (range(-(-n // size)) for n, size in zip((R, run), PIECE, strict=True))
        own = list(itertools.product([index], splits, range(len(taps.unfold)), blocks))
        fold_at = len(sources)
        unfold_at = fold_at + len(taps.fold)
        sources += [
            [len(row), *row, *[0] * (MOST_SOURCES - len(row))] for row in taps.fold + taps.unfold
        ]
        sizes.append(
            (
                R, run, len(taps.unfold), len(taps.fold), len(weight_pieces), len(own), fold_at,
                unfold_at, taps.divisor, int(low),
            )
        )  # fmt: skip
        weight_pieces += own
        kernel_pieces += itertools.product([index], splits, range(len(taps.fold)), blocks)

    def table(rows: Sequence[Sequence[int]], dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(rows, dtype=dtype, device=device)

    return NetworkTables(
        table(sizes, torch.int64), table(sources), table(weight_pieces), table(kernel_pieces)
    )


def addresses(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    kernels: Sequence[Tensor],
    dws: Sequence[Tensor] | None = None,
) -> Tensor:
    """[L, 6] int64: addresses, and whether all rows of a weight's tensors are aligned.

    Made in every call, since Ŵ and the gradients are new in every pass, and copied from pinned
    memory: a copy from elsewhere would make the host wait for all that the GPU has yet to do.
    """
    rows = []
    for i, (weight, u, v, kernel) in enumerate(zip(weights, us, vs, kernels, strict=True)):
        own = weight.data_ptr(), kernel.data_ptr(), 0 if dws is None else dws[i].data_ptr()
        folded = weight.shape != kernel.shape
        run = weight.shape[-1] if folded else weight.numel() // weight.shape[0]
        run_bytes = run * weight.element_size()
        aligned = all(address % ALIGNMENT == 0 for address in (*own, run_bytes))
        rows.append((own[0], u.data_ptr(), v.data_ptr(), own[1], own[2], int(aligned)))
    table = torch.tensor(rows, dtype=torch.int64)
    if weights[0].is_cuda:
        return table.pin_memory().to(weights[0].device, non_blocking=True)
    return table
