"""The least that the spectral norm of a network costs, from the formulas in network.py."""

from kernels.common.floor import Cost


def spectral_norm_floor(
    num_values: int, dtype_bytes: int, *, normalize: bool, backward: bool
) -> Cost:
    """One power iteration of weights of `num_values` in all; then Ŵ of `dtype_bytes`; then dW.

    All weights together fit no cache, so W is read twice, and dK.
    """
    cost = Cost(8 * num_values, 4 * num_values)
    if normalize:
        cost += Cost((8 + dtype_bytes) * num_values, 4 * num_values)
    if backward:
        cost += Cost((8 + 2 * dtype_bytes) * num_values, 6 * num_values)
    return cost
