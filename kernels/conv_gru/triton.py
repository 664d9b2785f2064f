# mypy: allow-untyped-defs
"""Triton kernels of `kernels.conv_gru`: the gates, and their launchers.

Every frame is S = H·W rows of C channels (of 2C for r with u, of 3C for what x adds to all gates),
contiguous; y and dy are one frame of a video [B, T, H, W, C], whose samples lie further apart. A
program owns a tile of pixels by channels of one sample's frame and touches every value once:

    reset_update    x's and h's share of the gates, h → r, u, r⊙h
    candidate       x's and r⊙h's share, u, h        → c, and h' twice: to be convolved, and in y
    candidate_grad  dy, what comes back, h, u, c     → before u's σ and c's relu, dh'⊙u
    reset_grad      what comes back to r⊙h, h, r     → before r's σ, r⊙h

All arithmetic is fp32; offsets of samples are int64, within one frame int32 (checked).
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.common.tiling import ceil_div
from kernels.frame_norm.triton import channel_block

# With four warps eight values per thread: one 16-byte access in bf16, and up to six arrays are
# in flight at once.
TILE = 1024
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def own_tile(S, C, num_tiles, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's sample (int64), its pixels and its channels."""
    index = tl.program_id(0).to(tl.int64)
    s = (index % num_tiles).to(tl.int32) * BLOCK_S + tl.arange(0, BLOCK_S)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    return index // num_tiles, s[:, None], c[None, :]


@triton.jit
def load(ptr, at, mask):
    """fp32, whatever is stored."""
    return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(ptr, at, value, mask):
    """Rounded to what is stored."""
    tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def reset_update_kernel(
    gates_x_ptr, gates_h_ptr, h_ptr, ru_ptr, rh_ptr,
    S, C, num_tiles, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """r, u, r⊙h."""
    b, s, c = own_tile(S, C, num_tiles, BLOCK_S, BLOCK_C)
    mask = (s < S) & (c < C)
    frame = b * S * C
    gates_x_ptr += frame * 3
    gates_h_ptr += frame * 2
    ru_ptr += frame * 2
    at, at_pair, at_gates = s * C + c, s * (2 * C) + c, s * (3 * C) + c

    r = tl.sigmoid(load(gates_x_ptr, at_gates, mask) + load(gates_h_ptr, at_pair, mask))
    u = tl.sigmoid(load(gates_x_ptr, at_gates + C, mask) + load(gates_h_ptr, at_pair + C, mask))
    h = load(h_ptr + frame, at, mask)
    store(ru_ptr, at_pair, r, mask)
    store(ru_ptr, at_pair + C, u, mask)
    store(rh_ptr + frame, at, r * h, mask)


@triton.jit
def candidate_kernel(
    gates_x_ptr, candidate_h_ptr, ru_ptr, h_ptr, c_ptr, y_ptr,
    y_stride, S, C, num_tiles,
    FIRST: tl.constexpr, KEEP: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """c and h'; at the FIRST frame r and u as well, and h is not read."""
    b, s, c = own_tile(S, C, num_tiles, BLOCK_S, BLOCK_C)
    mask = (s < S) & (c < C)
    frame = b * S * C
    gates_x_ptr += frame * 3
    ru_ptr += frame * 2
    at, at_pair, at_gates = s * C + c, s * (2 * C) + c, s * (3 * C) + c

    value = load(gates_x_ptr, at_gates + 2 * C, mask)
    if not FIRST:
        value += load(candidate_h_ptr + frame, at, mask)
    # Not tl.maximum, which drops NaN: a network that breaks must show it.
    value = tl.where(value <= 0.0, 0.0, value)
    if FIRST:
        u = tl.sigmoid(load(gates_x_ptr, at_gates + C, mask))
        store(ru_ptr, at_pair, tl.sigmoid(load(gates_x_ptr, at_gates, mask)), mask)
        store(ru_ptr, at_pair + C, u, mask)
        h = (1.0 - u) * value
    else:
        u = load(ru_ptr, at_pair + C, mask)
        h = u * load(h_ptr + frame, at, mask) + (1.0 - u) * value
    if KEEP:
        store(c_ptr + frame, at, value, mask)
    store(h_ptr + frame, at, h, mask)
    store(y_ptr + b * y_stride, at, h, mask)


@triton.jit
def candidate_grad_kernel(
    dy_ptr, direct_ptr, dh_ptr, h_ptr, ru_ptr, c_ptr, dz_ru_ptr, dz_c_ptr,
    dy_stride, S, C, num_tiles,
    FIRST: tl.constexpr, LAST: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Before u's σ and c's relu; FIRST and LAST in time."""
    b, s, c = own_tile(S, C, num_tiles, BLOCK_S, BLOCK_C)
    mask = (s < S) & (c < C)
    frame = b * S * C
    ru_ptr += frame * 2
    dz_ru_ptr += frame * 2
    at, at_pair = s * C + c, s * (2 * C) + c

    dh = load(dy_ptr + b * dy_stride, at, mask)
    if not LAST:
        dh += load(direct_ptr + frame, at, mask) + load(dh_ptr + frame, at, mask)
    u = load(ru_ptr, at_pair + C, mask)
    value = load(c_ptr + frame, at, mask)
    if FIRST:
        difference = -value
        store(dz_ru_ptr, at_pair, tl.zeros_like(value), mask)
    else:
        difference = load(h_ptr + frame, at, mask) - value
        store(direct_ptr + frame, at, dh * u, mask)
    store(dz_ru_ptr, at_pair + C, dh * u * (1.0 - u) * difference, mask)
    store(dz_c_ptr + frame, at, tl.where(value <= 0.0, 0.0, dh * (1.0 - u)), mask)


@triton.jit
def reset_grad_kernel(
    drh_ptr, h_ptr, ru_ptr, dz_ru_ptr, direct_ptr, rh_ptr,
    S, C, num_tiles, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Before r's σ; drh⊙r is added to `direct`."""
    b, s, c = own_tile(S, C, num_tiles, BLOCK_S, BLOCK_C)
    mask = (s < S) & (c < C)
    frame = b * S * C
    at, at_pair = s * C + c, s * (2 * C) + c

    r = load(ru_ptr + frame * 2, at_pair, mask)
    h = load(h_ptr + frame, at, mask)
    kept = load(drh_ptr + frame, at, mask) * r
    store(dz_ru_ptr + frame * 2, at_pair, kept * (1.0 - r) * h, mask)
    store(direct_ptr + frame, at, load(direct_ptr + frame, at, mask) + kept, mask)
    store(rh_ptr + frame, at, r * h, mask)


def reset_update(
    gates_x_BHW3C: Tensor,
    gates_h_BHW2C: Tensor,
    h_BHWC: Tensor,
    ru_BHW2C: Tensor,
    rh_BHWC: Tensor,
) -> None:
    """As `pytorch.reset_update`."""
    grid, sizes, tile = _plan(h_BHWC)
    reset_update_kernel[grid](
        gates_x_BHW3C, gates_h_BHW2C, h_BHWC, ru_BHW2C, rh_BHWC, *sizes, **tile
    )


def candidate(
    gates_x_BHW3C: Tensor,
    candidate_h_BHWC: Tensor | None,
    ru_BHW2C: Tensor,
    h_BHWC: Tensor,
    c_BHWC: Tensor | None,
    y_BHWC: Tensor,
) -> None:
    """As `pytorch.candidate`."""
    grid, sizes, tile = _plan(h_BHWC)
    candidate_kernel[grid](
        gates_x_BHW3C, candidate_h_BHWC, ru_BHW2C, h_BHWC, c_BHWC, y_BHWC,
        y_BHWC.stride(0), *sizes,
        FIRST=candidate_h_BHWC is None, KEEP=c_BHWC is not None, **tile,
    )  # fmt: skip


def candidate_grad(
    dy_BHWC: Tensor,
    direct_BHWC: Tensor,
    dh_BHWC: Tensor | None,
    h_BHWC: Tensor | None,
    ru_BHW2C: Tensor,
    c_BHWC: Tensor,
    dz_ru_BHW2C: Tensor,
    dz_c_BHWC: Tensor,
) -> None:
    """As `pytorch.candidate_grad`."""
    grid, sizes, tile = _plan(c_BHWC)
    candidate_grad_kernel[grid](
        dy_BHWC, direct_BHWC, dh_BHWC, h_BHWC, ru_BHW2C, c_BHWC, dz_ru_BHW2C, dz_c_BHWC,
        dy_BHWC.stride(0), *sizes, FIRST=h_BHWC is None, LAST=dh_BHWC is None, **tile,
    )  # fmt: skip


def reset_grad(
    drh_BHWC: Tensor,
    h_BHWC: Tensor,
    ru_BHW2C: Tensor,
    dz_ru_BHW2C: Tensor,
    direct_BHWC: Tensor,
    rh_BHWC: Tensor,
) -> None:
    """As `pytorch.reset_grad`."""
    grid, sizes, tile = _plan(h_BHWC)
    reset_grad_kernel[grid](
        drh_BHWC, h_BHWC, ru_BHW2C, dz_ru_BHW2C, direct_BHWC, rh_BHWC, *sizes, **tile
    )


def _plan(h_BHWC: Tensor) -> tuple[tuple[int, int], tuple[int, int, int], dict[str, int]]:
    """The grid, the sizes (S, C, tiles of a frame's pixels), and the tile with its options.

    Raises ValueError for a frame whose gates are 2^31 values or more: offsets within are int32.
    """
    B, H, W, C = h_BHWC.shape
    S = H * W
    if 3 * S * C >= 2**31:
        raise ValueError(f"a frame of {S} pixels x 3 x {C} channels has 2^31 values or more")
    block_c = channel_block(C)
    block_s = TILE // block_c
    num_tiles = ceil_div(S, block_s)
    grid = B * num_tiles, ceil_div(C, block_c)
    return grid, (S, C, num_tiles), {"BLOCK_S": block_s, "BLOCK_C": block_c, **OPTIONS}
