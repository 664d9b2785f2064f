"""What is counted while a step runs: live bytes, FLOPs and bytes moved, by phase."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import kernels.flop_formulas  # noqa: F401 — our own operators, for the registry
from engine.planning.live_bytes import ACTIVATIONS, GRADIENTS, LiveBytes, tensors_in

FROZEN, FORWARD, BACKWARD = "frozen stages", "forward", "backward"


@dataclass
class Update:
    """What one update, of D or of G, of one micro-batch keeps and computes."""

    most: dict[tuple[str, int], int] = field(default_factory=dict)
    """(phase, bytes of gradients in it) → the most bytes of everything but gradients, parameters
    and optimizer state that lived at such a moment."""
    flops: Counter[str] = field(default_factory=Counter)
    """Executed in each phase: convolutions and matrix products, two per multiply-add."""
    moved: Counter[str] = field(default_factory=Counter)
    """Bytes of each operator's arguments and results, in each phase."""
    most_values: int = 0
    """Of the largest tensor that an operator reads or writes."""


class Phases:
    """Says in which phase of an update the code is."""

    def __init__(self) -> None:
        self.now = FORWARD

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Until the context ends."""
        before, self.now = self.now, phase
        try:
            yield
        finally:
            self.now = before


class UpdateBytes(LiveBytes):
    """Live bytes, the most of them beside every amount of gradients, by phase of an update."""

    def __init__(self, update: Update, phases: Phases, *, block_bytes: int) -> None:
        super().__init__(block_bytes=block_bytes)
        self.update, self._phases = update, phases

    def changed(self) -> None:
        """Take note."""
        super().changed()
        key = self._phases.now, self.now[GRADIENTS]
        if self.now[ACTIVATIONS] > self.update.most.get(key, -1):
            self.update.most[key] = self.now[ACTIVATIONS]


class WorkByPhase(TorchDispatchMode):
    """FLOPs, and bytes that operators read and write.

    Counts FLOPs as `FlopCounterMode` does, whose hooks on modules would keep tensors alive.
    """

    def __init__(self, update: Update, phases: Phases) -> None:
        super().__init__()
        self.update, self._phases = update, phases

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run, then count."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.update.flops[self._phases.now] += formula(*args, **kwargs, out_val=result)
        read, written = tensors_in((args, kwargs)), tensors_in(result)
        largest = max((tensor.numel() for tensor in read + written), default=0)
        self.update.most_values = max(self.update.most_values, largest)
        if read and not _is_view(func, read, written):
            self.update.moved[self._phases.now] += _moved_bytes(func, args, read, written)
        return result


_OVERWRITING = ("copy_", "fill_", "zero_", "gru_")  # by the beginning of their names


def _moved_bytes(func: Any, args: Any, read: list[Tensor], written: list[Tensor]) -> int:
    """What is read and what is written, of what is changed in place both."""
    name = func._overloadpacket.__name__
    if name.startswith(("new_", "empty_like", "zeros_like", "ones_like")):  # only the shape is read
        return 0 if "empty" in name else sum(tensor.nbytes for tensor in written)
    if func._schema.is_mutable:
        changed = [
            tensor
            for argument, given in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tensors_in(given)
        ]
        returns_them = any(result.alias_info is not None for result in func._schema.returns)
        written = [] if returns_them else written
        written = written if name.startswith(_OVERWRITING) else written + changed
    return sum(tensor.nbytes for tensor in read + written)


def _is_view(func: Any, read: list[Tensor], written: list[Tensor]) -> bool:
    if func._schema.is_mutable:
        return False
    storages = {tensor.untyped_storage()._cdata for tensor in read}
    return all(tensor.untyped_storage()._cdata in storages for tensor in written)


class ChannelsLastConvolutions(TorchDispatchMode):
    """Convolutions answer channels last where their input is, as cuDNN's and oneDNN's do.

    PyTorch's meta convolution answers in another layout than the real one, after which the
    networks would seem to copy.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run; lay out the result anew."""
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            return _laid_out(result, like=args[0])
        if func is torch.ops.aten.convolution_backward.default:
            return tuple(
                None if grad is None else _laid_out(grad, like=args[1] if grad.ndim > 1 else grad)
                for grad in result
            )
        return result


def _laid_out(result: Tensor, like: Tensor) -> Tensor:
    if not result.is_meta or like.ndim not in (4, 5):
        return result
    layout = torch.channels_last if like.ndim == 4 else torch.channels_last_3d
    if not like.is_contiguous(memory_format=layout):
        return result
    return torch.empty_like(result, memory_format=layout)
