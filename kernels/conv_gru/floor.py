"""The least that `kernels.conv_gru` costs, from the formulas in its docstring.

Shapes: B batch, T frames, C channels, H x W pixels.
"""

from typing import Any

from torch import Tensor

from kernels.common.floor import Cost, Floor


def conv_gru_floor(x_BTCHW: Tensor, **_: Any) -> Floor:
    """54·C² for the half that reads x, once where x is constant, and for that which reads h."""
    B, T, C, H, W = x_BTCHW.shape
    size, frame, weights = x_BTCHW.element_size(), B * C * H * W, 54 * C * C
    x_frames = 1 if T > 1 and x_BTCHW.stride(1) == 0 else T
    flops = 54 * C * frame * (x_frames + T - 1)
    # Backward x, every h and its gradient are read, dx is written.
    return Floor(
        Cost(size * (frame * (x_frames + T) + weights), flops),
        Cost(size * (frame * 2 * (x_frames + T) + 2 * weights), 2 * flops),
    )
