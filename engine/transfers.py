"""Small tensors on their way to the device."""

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for a GPU: from pageable memory a copy waits until all that
    was launched before it has run."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
