"""Devices: which one, copies that make no host wait, tensors kept until a GPU has read them."""

from collections import deque

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """The values on the device, without waiting for a GPU.

    They are pinned first: a copy from pageable memory waits until all work launched before has run.
    """
    if device.type == "cuda" and values.device.type == "cpu":
        # PyTorch copies a tensor with gaps into pageable memory first, even from pinned memory.
        values = values.contiguous().pin_memory()
    return values.to(device, non_blocking=True)


class HeldUntilRead:
    """Keeps tensors until a GPU has run what was launched so far, without making the host wait.

    For memory of another library, which may be written again as soon as nobody holds it. Where the
    GPU is `most` tensors behind, the host waits for the oldest.
    """

    def __init__(self, most: int = 8) -> None:
        self._most = most
        self._held: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def add(self, tensor: Tensor) -> None:
        """Hold a tensor that was read by what is launched on the current stream."""
        if tensor.device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(tensor.device))
        self._held.append((tensor, event))
        while self._held and self._held[0][1].query():
            self._held.popleft()
        if len(self._held) > self._most:
            oldest, event = self._held.popleft()
            event.synchronize()
            del oldest  # not before: what nobody holds may be written again

    def __len__(self) -> int:
        return len(self._held)


def device_named(name: torch.device | str) -> torch.device:
    """The device of that name; "auto" is the GPU where there is one."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(found if name == "auto" else name)
