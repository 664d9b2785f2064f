"""Bytes that operators read and write, as the planner counts them, against counts by hand."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kernels
from engine.planning.counters import FORWARD, ChannelsLastConvolutions, Phases, Update, WorkByPhase

N = 2 * 3 * 4 * 8  # values, fp32


def residual_and_bias(x: Tensor, y: Tensor) -> None:
    """`add_terms_` as a GPU would run it: x is changed, y read."""
    weight, bias = torch.empty(8, 1, 1, 8, device="meta"), torch.empty(8, device="meta")
    videos = [v.view(2, 3, 2, 2, 8).permute(0, 1, 4, 2, 3) for v in (x, y)]
    with kernels.meta_as("cuda"), torch.no_grad():
        kernels.conv2d(videos[0], weight, bias, residual_BTOHW=videos[1])


CASES: dict[str, tuple[Callable[[Tensor, Tensor], object], int]] = {
    "out of place": (lambda x, y: x + y, 3 * N),
    "in place": (lambda x, y: x.add_(y), 3 * N),
    "in place, of one": (lambda x, y: x.mul_(2), 2 * N),
    "overwritten": (lambda x, y: x.copy_(y), 2 * N),
    "a view": (lambda x, y: x.view(-1), 0),
    "new memory": (lambda x, y: (torch.empty_like(x), x.new_empty(5)), 0),
    "new zeros": (lambda x, y: torch.zeros_like(x), N),
    # The convolution reads x and the weight and writes y; then y and the residual are read and y
    # is written, and the bias is read.
    "a convolution and its terms": (residual_and_bias, 2 * N + 64 + 3 * N + 8),
}


@pytest.mark.parametrize("name", CASES)
def test_moved_bytes(name: str) -> None:
    run, values = CASES[name]
    x, y = (torch.empty(2, 3, 4, 8, device="meta") for _ in range(2))
    update = Update()
    with ChannelsLastConvolutions(), WorkByPhase(update, Phases()):
        run(x, y)
    assert update.moved[FORWARD] == 4 * values
