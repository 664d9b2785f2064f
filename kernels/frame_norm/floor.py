"""The least that `kernels.frame_norm` costs, from the formulas in its docstring."""

from typing import Any

from torch import Tensor

from kernels.common.floor import Cost, Floor


def frame_norm_floor(x_BTCHW: Tensor, **_: Any) -> Floor:
    """x is read or written three times forward, x and dy five times backward."""
    values = x_BTCHW.numel()
    return Floor(Cost(3 * x_BTCHW.nbytes, 8 * values), Cost(5 * x_BTCHW.nbytes, 14 * values))
