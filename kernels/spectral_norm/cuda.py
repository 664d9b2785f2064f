"""`kernels.power_iteration_` in CUDA C++: csrc/, where it has been built."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.common import csrc_libraries
from kernels.spectral_norm.power_iteration_tables import COLUMN_TILE, ROW_TILE, addresses, cut


def unavailable() -> str | None:
    """Why the library is not there; None where it is, and then it is loaded."""
    return csrc_libraries.unavailable(csrc_libraries.CUDA)


def power_iteration(
    weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], num_iterations: int
) -> Tensor:
    """σ [L]; u and v in place. Contiguous fp32 tensors on one CUDA device."""
    shapes = tuple((weight.shape[0], weight[0].numel()) for weight in weights)
    work = cut(shapes, weights[0].device)
    sigma_L = weights[0].new_empty(len(weights))
    torch.ops.sswgan_csrc.power_iteration(
        addresses(weights, us, vs),
        work.sizes,
        work.column_sums,
        work.merge_columns,
        work.row_sums,
        weights[0].new_empty(work.workspace_values),
        sigma_L,
        [*COLUMN_TILE, *ROW_TILE],
        num_iterations,
        torch.cuda.current_stream(weights[0].device).cuda_stream,
    )
    return sigma_L
