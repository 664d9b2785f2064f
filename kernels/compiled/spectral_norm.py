# mypy: allow-untyped-defs
"""`kernels.spectral_norm`'s kernels as they are launched."""

from collections.abc import Iterator

from kernels.compiled.variant import Variant
from kernels.spectral_norm import network_triton, power_iteration_triton, weight_triton


def variants() -> Iterator[Variant]:
    """Of the power iteration, of single weights and of a whole network's."""
    yield from _power_iteration()
    yield from _weight()
    yield from _network()


def _power_iteration() -> Iterator[Variant]:
    """Four kernels, all weights of a network in each."""
    for kernel, tile in (
        (power_iteration_triton.column_sums_kernel, power_iteration_triton.COLUMN_SUMS),
        (power_iteration_triton.merge_columns_kernel, power_iteration_triton.MERGE_COLUMNS),
        (power_iteration_triton.row_sums_kernel, power_iteration_triton.ROW_SUMS),
        (power_iteration_triton.finish_kernel, power_iteration_triton.FINISH),
    ):
        types = {"table_ptr": "*i64", "sizes_ptr": "*i64", "work_ptr": "*i32"}
        types |= {"workspace_ptr": "*fp32", "sigma_ptr": "*fp32"}
        own = {name: types[name] for name in kernel.arg_names if name in types}
        yield Variant(kernel, "fp32", own, tile, power_iteration_triton.OPTIONS)


def _weight() -> Iterator[Variant]:
    """Every kernel at a wide and a narrow tile."""
    sums = {"BLOCK_P": weight_triton.MOST_PROGRAMS}
    for K in (256, 32):
        block = {"BLOCK_R": weight_triton.TILE // K, "BLOCK_K": K}
        for dtype in ("bf16", "fp32"):
            label = f"{dtype} {weight_triton.TILE // K}x{K}"
            if dtype == "fp32":  # Ŵ and dŴ take no part in it
                yield _variant(weight_triton.sigma_kernel, label, dtype, block)
            yield _variant(weight_triton.normalize_kernel, label, dtype, block | sums)
            yield _variant(weight_triton.inner_kernel, label, dtype, block)
            yield _variant(weight_triton.dw_kernel, label, dtype, block | sums)


def _variant(kernel, label: str, dtype: str, constants: dict[str, int]) -> Variant:
    def type_of(name: str) -> str:
        if name.endswith("_ptr"):
            return f"*{dtype}" if name in ("y_ptr", "dy_ptr") else "*fp32"
        return "i32"

    types = {name: type_of(name) for name in kernel.arg_names if name not in constants}
    return Variant(
        kernel, label, types, constants, weight_triton.OPTIONS, divisible=frozenset({"K"})
    )


def _network() -> Iterator[Variant]:
    """Every kernel, all weights of a network in each."""
    types = {"table_ptr": "*i64", "sizes_ptr": "*i64", "sources_ptr": "*i32", "work_ptr": "*i32"}
    types |= {"partial_ptr": "*fp32", "sigma_ptr": "*fp32"}
    for kernel, tile in (
        (network_triton.sigma_kernel, network_triton.TILE),
        (network_triton.normalize_kernel, network_triton.TILE | network_triton.SUMS),
        (network_triton.inner_kernel, network_triton.TILE),
        (network_triton.dw_kernel, network_triton.TILE | network_triton.SUMS),
    ):
        for low in ("bf16", "fp32") if "low_ptr" in kernel.arg_names else ("fp32",):
            every = types | {"low_ptr": f"*{low}"}
            own = {name: every[name] for name in kernel.arg_names if name in every}
            yield Variant(kernel, low, own, tile, network_triton.OPTIONS)
