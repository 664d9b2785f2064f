# mypy: allow-untyped-defs
"""`kernels.conv_gru`'s kernels as they are launched."""

from collections.abc import Iterator, Sequence

from kernels.compiled.variant import Variant
from kernels.conv_gru.triton import (
    OPTIONS,
    TILE,
    candidate_grad_kernel,
    candidate_kernel,
    reset_grad_kernel,
    reset_update_kernel,
)


def variants() -> Iterator[Variant]:
    """Every kernel, at the first, a middle and the last frame, at the tiles for many and for few
    channels, for `kernels.compiled`."""
    tiles = (*(("bf16", c) for c in (128, 64, 32)), *(("fp32", c) for c in (128, 64, 32)))
    for dtype, block_c in tiles:
        tile = {"BLOCK_S": TILE // block_c, "BLOCK_C": block_c}
        label = f"{dtype} {tile['BLOCK_S']}x{block_c}"
        yield _variant(reset_update_kernel, label, dtype, tile)
        for first, keep in ((False, False), (False, True), (True, False), (True, True)):
            flags = tile | {"FIRST": first, "KEEP": keep}
            absent = ["candidate_h_ptr"] * first + ["c_ptr"] * (not keep)
            at = label + " first" * first + " kept" * keep
            yield _variant(candidate_kernel, at, dtype, flags, absent)
        for first, last in ((False, False), (True, False), (False, True)):
            flags = tile | {"FIRST": first, "LAST": last}
            absent = ["h_ptr"] * first + ["dh_ptr"] * last
            at = label + " first" * first + " last" * last
            yield _variant(candidate_grad_kernel, at, dtype, flags, absent)
        yield _variant(reset_grad_kernel, label, dtype, tile)


def _variant(kernel, label: str, dtype: str, constants, absent: Sequence[str] = ()) -> Variant:
    constants = constants | dict.fromkeys(absent)
    types = {
        name: f"*{dtype}" if name.endswith("_ptr") else "i32"
        for name in kernel.arg_names
        if name not in constants
    }
    divisible = frozenset({"C", "y_stride", "dy_stride"} & types.keys())
    return Variant(kernel, label, types, constants, OPTIONS, divisible=divisible)
