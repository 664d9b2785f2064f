"""Copies of tensors in main memory, of which a checkpoint is written while training goes on."""

from collections.abc import Callable

import torch
from torch import Tensor

Copy = Callable[[str, Tensor], Tensor]
"""The copy of a tensor, which has a name of its own."""


def new_copy(name: str, tensor: Tensor) -> Tensor:
    """In memory of its own."""
    return tensor.detach().to("cpu", copy=True)


class KeptCopies:
    """Copies into the memory of the ones before, which takes half the time of new memory.

    Where it comes from a GPU, the memory is pinned. Whoever reads a copy must be done before the
    next is made.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """See `Copy`."""
        kept = self._kept.get(name)
        if kept is None or (kept.shape, kept.dtype) != (tensor.shape, tensor.dtype):
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._kept[name] = kept
        return kept.copy_(tensor.detach())

    def under(self, prefix: str) -> Copy:
        """The same, with names that begin so."""
        return lambda name, tensor: self(f"{prefix} {name}", tensor)
