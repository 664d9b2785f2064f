"""Small tensors reach the device as they are, and nobody waits for them."""

import pytest
import torch

from engine.transfers import to_device


def test_values_are_kept() -> None:
    values = torch.arange(6).view(2, 3).T
    assert to_device(values, torch.device("cpu")).equal(values)
    assert to_device(values, torch.device("meta")).shape == values.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_not_waited_for() -> None:
    values, device = torch.arange(6), torch.device("cuda", 0)
    to_device(values, device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = to_device(values, device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert there.cpu().equal(values)
