# mypy: allow-untyped-defs
"""`kernels.convolution`'s kernels as they are launched."""

from collections.abc import Iterator

from kernels.compiled.variant import CHANNEL_TILES, Variant
from kernels.convolution.epilogue import MERGE_TILE, add_terms_kernel
from kernels.convolution.tiles import WIDE, configurations
from kernels.convolution.triton import GROUP, convolve_kernel
from kernels.frame_norm.triton import OPTIONS, TILE, merge_moments_kernel


def variants() -> Iterator[Variant]:
    """For `kernels.compiled`. `convolve`, which nothing launches unless it is asked for by name:
    every tile, with all terms and ReLU; over time, 1x1 and over both, which take another way
    through the kernel, the tile of most registers, in full and masked; that tile, too, with a
    residual to be upsampled. `add_terms`: every tile with all terms that models add at once."""
    spatial = [(*configuration, (1, 3, 3), False) for configuration in configurations()]
    others = [
        ("bf16", WIDE._replace(block_k=block_k), masked, taps, False)
        for taps in ((3, 1, 1), (1, 1, 1), (3, 3, 3))
        for block_k, masked in ((64, False), (16, True))
    ]
    upsampling = [("bf16", WIDE, False, (1, 3, 3), True)]
    for dtype, config, masked, taps, half in spatial + others + upsampling:
        label = f"{dtype} {config.block_m}x{config.block_n}x{config.block_k}"
        label += "" if taps == (1, 3, 3) else " {}x{}x{}".format(*taps)
        label += " upsampling" * half
        constants = dict(zip(("KT", "KH", "KW"), taps, strict=True))
        constants |= {"MASK_K": masked, "HALF": half, "RELU": True}
        yield _variant(
            convolve_kernel,
            label + " masked" * masked,
            dtype,
            constants | config.tile | {"GROUP_M": GROUP},
            config.options,
            divisible=frozenset({"O"} if masked else {"I", "O"}),
            # fp32 stays fp32: tensor cores would round its factors to TF32's ten bits.
            multiplies_matrices=dtype != "fp32",
        )
    for dtype, block_c, aligned in CHANNEL_TILES:
        for terms in _TERMS:
            yield _adding(dtype, block_c, aligned, *terms)
    for dtype in ("bf16", "fp32"):  # a picture's three channels, to which a bias is added
        yield _adding(dtype, 4, False, "", False, False, False)
    for aligned in (True, False):
        label = "fp32 {BLOCK_P}x{BLOCK_C}".format(**MERGE_TILE) + " unaligned" * (not aligned)
        divisible = frozenset({"C"} if aligned else ())
        yield _variant(merge_moments_kernel, label, "fp32", MERGE_TILE, divisible=divisible)


# Besides the bias: a residual, x_l, which only the end of a block adds, moments; ReLU by itself.
_TERMS: tuple[tuple[str, bool, bool, bool], ...] = (
    *(
        (residual, low, moments, False)
        for residual in ("", "residual", "upsampling")
        for low in ((False, True) if residual else (False,))
        for moments in (False, True)
    ),
    ("", False, False, True),
)


def _adding(
    dtype: str, block_c: int, aligned: bool, residual: str, low: bool, moments: bool, relu: bool
) -> Variant:
    constants: dict[str, int | None] = {"BLOCK_S": TILE // block_c, "BLOCK_C": block_c}
    label = f"{dtype} {TILE // block_c}x{block_c}" + " unaligned" * (not aligned)
    label += f" {residual}" * bool(residual) + " x_l" * low + " moments" * moments + " relu" * relu
    constants |= {"HALF": residual == "upsampling", "RELU": relu}
    absent = ["residual_ptr"] * (not residual)
    absent += ["video_ptr", "low_weight_ptr", "low_bias_ptr"] * (not low)
    absent += ["split_mean_ptr", "split_square_ptr"] * (not moments)
    constants |= dict.fromkeys(absent)
    divisible = frozenset({"O"} if aligned else ())
    return _variant(add_terms_kernel, label, dtype, constants, divisible=divisible)


def _variant(kernel, label: str, dtype: str, constants, options=OPTIONS, **properties) -> Variant:
    def type_of(name: str) -> str:
        if name.endswith("_ptr"):
            return "*fp32" if name.startswith("split_") else f"*{dtype}"
        return "fp32" if name == "total" else "i32"

    types = {name: type_of(name) for name in kernel.arg_names if name not in constants}
    return Variant(kernel, label, types, constants, options, **properties)
