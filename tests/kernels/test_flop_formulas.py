"""PyTorch's FLOP counter sees as much in the Triton operators as in PyTorch's for the same."""
# ruff: noqa: E741  (I and O are input and output channels)

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import kernels
import kernels.flop_formulas

B, T, I, O, H, W = 2, 4, 6, 5, 8, 4
LOW_CHANNELS = 3


def empty(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def counted(implementation: str, operator: str, skip: kernels.LowSkip | None) -> int:
    x = empty(B, T, I, H, W)
    with FlopCounterMode(display=False) as counter:
        if operator == "separable_conv3d":
            weights = empty(O, 3, I), empty(O, 3, 3, O), empty(O)
            kernels.separable_conv3d(x, *weights, skip=skip, implementation=implementation)
        elif operator == "conv3d":
            kernels.conv3d(
                x, empty(O, 3, 3, 3, I), empty(O), relu=True, implementation=implementation
            )
        else:
            kernels.conv2d(x, empty(O, 3, 3, I), empty(O), skip=skip, implementation=implementation)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("implementation", ["triton", "epilogue"])
@pytest.mark.parametrize("operator", ["conv2d", "separable_conv3d"])
@pytest.mark.parametrize("low_frames", [None, T, T // 2])
def test_triton_operators_count_what_pytorchs_do(
    implementation: str, operator: str, low_frames: int | None
) -> None:
    skip = None
    if low_frames is not None:
        low = empty(B, low_frames, LOW_CHANNELS, 2 * H, W)
        skip = kernels.LowSkip(low, empty(O, 1, 1, LOW_CHANNELS), empty(O))
    # A kernel projects x_l anew for each frame of y; PyTorch's form does so once per frame of x_l.
    frames_more = 0 if low_frames is None else T - low_frames
    more = 2 * LOW_CHANNELS * O * B * frames_more * H * W
    plain = counted("pytorch", operator, skip)
    assert plain > 0
    assert counted(implementation, operator, skip) == plain + more


def test_a_convolution_by_hand() -> None:
    assert counted("triton", "conv2d", None) == 2 * 9 * I * O * B * T * H * W
    for implementation in ("triton", "epilogue", "pytorch"):
        assert counted(implementation, "conv3d", None) == 2 * 27 * I * O * B * T * H * W
