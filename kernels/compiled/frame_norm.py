# mypy: allow-untyped-defs
"""`kernels.frame_norm`'s kernels as they are launched."""

from collections.abc import Iterator

from kernels.compiled.variant import CHANNEL_TILES, Variant
from kernels.frame_norm.triton import (
    MERGE_TILE,
    OPTIONS,
    TILE,
    dx_kernel,
    merge_moments_kernel,
    merge_sums_kernel,
    moments_kernel,
    normalize_kernel,
    sums_kernel,
)


def variants() -> Iterator[Variant]:
    """Every kernel at every tile."""
    for dtype, block_c, aligned in CHANNEL_TILES:
        tile = {"BLOCK_S": TILE // block_c, "BLOCK_C": block_c}
        label = f"{dtype} {tile['BLOCK_S']}x{block_c}" + " unaligned" * (not aligned)
        for kernel in (moments_kernel, normalize_kernel, sums_kernel):
            yield _variant(kernel, label, dtype, tile, aligned)
        yield _variant(dx_kernel, label, dtype, tile | {"TERMS": True}, aligned)
    for aligned in (True, False):
        label = "fp32" + " unaligned" * (not aligned)
        yield _variant(merge_moments_kernel, label, "fp32", MERGE_TILE, aligned)
        yield _variant(merge_sums_kernel, label, "fp32", MERGE_TILE, aligned)


def _variant(kernel, label: str, dtype: str, constants, aligned: bool) -> Variant:
    # Gain and bias are the models', which are fp32.
    videos = ("x_ptr", "y_ptr", "dy_ptr", "dx_ptr")

    def type_of(name: str) -> str:
        if name.endswith("_ptr"):
            return f"*{dtype}" if name in videos else "*fp32"
        return "fp32" if name == "total" else "i32"

    types = {name: type_of(name) for name in kernel.arg_names if name not in constants}
    divisible = frozenset({"C"} if aligned else ())
    return Variant(kernel, label, types, constants, OPTIONS, divisible=divisible)
