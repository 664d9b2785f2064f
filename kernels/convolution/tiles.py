# ruff: noqa: E741  (I and O are input and output channels)
"""How `triton.py` cuts a convolution into programs, and what it and `epilogue.py` refuse.

Rows are the B·S pixels of one time step, S = H·W, and columns the O output channels. A tile has
BLOCK_M rows and BLOCK_N columns, and goes through taps and input channels BLOCK_K at a time. It may
cross from a frame into the same time step's frame of the next sample, so that 4x4 frames fill
tiles too, but never into another time step: the norm's statistics are per time step.

The tables are reasoned from register and shared-memory counts, and have not been tuned on a GPU.

Shapes: B batch, T frames, I input and O output channels, H x W pixels; x_l has t frames of h x w.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Skip = tuple[Tensor, Tensor, Tensor]
"""x_l [B, t, h, w, I'], and its projection's weight [O, I'] and bias [O]."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_ROWS = 2**31 - 128
"""Pixels, of all frames, are counted in int32; offsets of values are int64."""


class Tiling(NamedTuple):
    """Sizes of a tile, and the options of its kernel."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @property
    def tile(self) -> dict[str, int]:
        """The kernel's constants."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}

    @property
    def options(self) -> dict[str, int]:
        """Triton's options."""
        # Fusion said outright: Triton 3.9 warns that its default is to change.
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }


# 16 bit. 64 input channels are a row of 128 bytes, which is what shared memory swizzles best.
# 128 columns by eight warps are 64 accumulators per thread, and 96 KiB for three stages: one block
# of a multiprocessor, two of an H100's where no more than a bias is added (128 registers;
# resources.json has those of all terms). 64 columns, too, take eight warps: with four, Blackwell's
# one row per thread spills. Stages grow as tiles shrink: as many bytes are to be under way.
WIDE = Tiling(128, 128, 64, 8, 3)
BY_WIDTH = {
    64: Tiling(128, 64, 64, 8, 3),
    32: Tiling(128, 32, 64, 4, 4),
    16: Tiling(128, 16, 64, 4, 4),
}
# 4x4 frames of four samples are one tile of 64 rows. Half the columns, too, make twice the
# programs: 192 of them at 1024 channels and 12 frames, which is more than there are processors.
FEW_ROWS = Tiling(64, 64, 64, 4, 4)
# fp32 multiplies on the ordinary cores, its factors in registers: small tiles, and short ones.
SINGLE = {64: Tiling(64, 64, 16, 4, 2), 16: Tiling(64, 16, 16, 4, 2)}
INPUT_BLOCKS = (64, 32, 16)  # 16 is the least that a tensor core multiplies


def configuration(dtype: torch.dtype, rows: int, I: int, O: int) -> Tiling:
    """The tile for `rows` pixels per time step, I input and O output channels."""
    if dtype == torch.float32:
        return SINGLE[64 if O > 16 else 16]
    if O > 64:
        config = FEW_ROWS if rows <= FEW_ROWS.block_m else WIDE
    else:
        config = BY_WIDTH[max(16, 1 << (O - 1).bit_length())]
        config = FEW_ROWS if O > 32 and rows <= FEW_ROWS.block_m else config
    return config._replace(block_k=_input_block(I))


def _input_block(I: int) -> int:
    """A divisor of I, so that nothing is masked, or the least there is."""
    return next((block for block in INPUT_BLOCKS if I % block == 0), INPUT_BLOCKS[-1])


def configurations() -> Iterator[tuple[str, Tiling, bool]]:
    """Every tile that `configuration` returns, the dtype it is for, and whether I is masked."""
    for config in (WIDE, *BY_WIDTH.values(), FEW_ROWS):
        for block_k in INPUT_BLOCKS:
            yield "bf16", config._replace(block_k=block_k), False
        yield "bf16", config._replace(block_k=INPUT_BLOCKS[-1]), True
    for config in SINGLE.values():
        for masked in (False, True):
            yield "fp32", config, masked


def check_convolution(x_BTHWI: Tensor, weight_OthwI: Tensor) -> None:
    """Raises ValueError for what `convolve` cannot take."""
    _expect(x_BTHWI.ndim == 5, "x", x_BTHWI, "[B, T, H, W, I]")
    _expect(weight_OthwI.ndim == 5, "weight", weight_OthwI, "[O, kt, kh, kw, I]")
    num_inputs = x_BTHWI.shape[4]
    right = weight_OthwI.shape[4] == num_inputs
    _expect(right, "weight", weight_OthwI, f"[O, kt, kh, kw, {num_inputs}]")
    sizes = weight_OthwI.shape[1:4]
    if any(size % 2 == 0 for size in sizes):
        raise ValueError(f"a kernel of {tuple(sizes)} has no centre: all three sizes must be odd")
    if weight_OthwI.numel() == 0:
        raise ValueError(f"a weight of {tuple(weight_OthwI.shape)} is empty")
    if weight_OthwI.dtype != x_BTHWI.dtype:
        raise ValueError(f"weight is {weight_OthwI.dtype}, x is {x_BTHWI.dtype}")
    check_layout(x=x_BTHWI, weight=weight_OthwI)


def check_terms(
    shape_BTHWO: tuple[int, ...],
    bias_O: Tensor | None,
    residual_BTHWO: Tensor | None,
    skip: Skip | None,
    moments: bool,
) -> None:
    """Raises ValueError for terms that do not fit an output of this shape."""
    B, T, H, W, O = shape_BTHWO
    if B * T * H * W >= MAX_ROWS:
        raise ValueError(f"a video of {(B, T, H, W)} has 2^31 pixels or more")
    if moments and B * T * H * W == 0:
        raise ValueError(f"an empty video, {shape_BTHWO}, has no mean and variance")
    if bias_O is not None:
        _expect(bias_O.shape == (O,), "bias", bias_O, f"[{O}]")
        check_layout(bias=bias_O)
    if residual_BTHWO is not None:
        half = (B, T, H // 2, W // 2, O)
        halves = residual_BTHWO.shape == half and H % 2 == W % 2 == 0
        fits = residual_BTHWO.shape == shape_BTHWO or halves
        _expect(fits, "residual", residual_BTHWO, f"{[*shape_BTHWO]} or, upsampled, {[*half]}")
        check_layout(residual=residual_BTHWO)
    if skip is None:
        return
    video, weight, bias = skip
    _expect(video.ndim == 5 and video.shape[0] == B, "skip's video", video, f"[{B}, t, h, w, I]")
    low_channels = video.shape[4]
    _expect(weight.shape == (O, low_channels), "skip's weight", weight, f"[{O}, {low_channels}]")
    _expect(bias.shape == (O,), "skip's bias", bias, f"[{O}]")
    check_layout(video=video, skip_weight=weight, skip_bias=bias)
    t, h, w = video.shape[1:4]
    if B * t * h * w >= MAX_ROWS or h * w * low_channels >= 2**31:
        raise ValueError(
            f"x_l, {[*video.shape]}, has 2^31 pixels or more, or a frame of as many values"
        )
    if B * T * H * W and (0 in (t, h, w) or T % t or h % H or w % W):
        raise ValueError(
            f"a {h}x{w}/{t} video cannot be injected into features of {H}x{W}/{T}: "
            "frames may only be repeated, pixels only skipped"
        )


def check_layout(**tensors: Tensor) -> None:
    """Raises ValueError for a tensor that is not contiguous, or not of fp32, fp16 or bf16."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be fp32, fp16 or bf16, not {tensor.dtype}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, not of strides {tensor.stride()}")


def _expect(right: bool, name: str, tensor: Tensor, shape: str) -> None:
    if not right:
        raise ValueError(f"{name} must be {shape}, not {[*tensor.shape]}")
