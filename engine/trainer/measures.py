"""Numbers a step reports: summed on the device, read once per step, averaged over the ranks."""

import torch
import torch.distributed as dist
from torch import Tensor


class Means:
    """Means over the micro-batches of one update, without a device synchronisation each."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Add one scalar."""
        value = value.detach()
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] = self._counts.get(name, 0) + 1

    def all(self) -> dict[str, Tensor]:
        """Name → mean."""
        return {name: total / self._counts[name] for name, total in self._sums.items()}


def mean_over_ranks(measures: dict[str, Tensor], device: torch.device) -> dict[str, float]:
    """One all-reduce for all of them; a NaN on one rank is a NaN on every rank."""
    values = torch.stack([value.to(device, torch.float32) for value in measures.values()])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return dict(zip(measures, values.tolist(), strict=True))
