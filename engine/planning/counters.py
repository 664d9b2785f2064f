"""Counters of what runs inside `with`: bytes of tensors that live, FLOPs, and bytes moved.

They work on meta tensors, fake ones and real ones alike. `LiveBytes` counts any code; `UpdateBytes`
and `WorkByPhase` count one update of D or of G, apart for the frozen stages, the forward and the
backward pass.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry
from torch.utils.hooks import RemovableHandle

import kernels.flop_formulas  # noqa: F401 — our own operators, for the registry

PARAMETERS, GRADIENTS, OPTIMIZER, ACTIVATIONS = CATEGORIES = (
    "parameters",
    "gradients",
    "optimizer",
    "activations",
)
"""The last one is everything else."""

CUDA_BLOCK_BYTES = 512
"""PyTorch's CUDA allocator rounds every request up to a multiple of this."""

FROZEN, FORWARD, BACKWARD = "frozen stages", "forward", "backward"

_OVERWRITING = ("copy_", "fill_", "zero_", "gru_")
"""Beginnings of the names of operators that write a tensor without reading it."""


class LiveBytes(TorchDispatchMode):
    """A context that counts the bytes of all tensors that live, and the most that ever did.

    It counts storages, each once, from the operator that returns it first until nothing refers to
    it any more. A tensor that existed before is counted once `register` names it, or an operator
    reads it. With `block_bytes` every storage is rounded up to a multiple of that. Scratch memory
    inside an operator is not seen, nor what an operator of our own frees before it returns.

    Autograd's own work is seen too, since a backward pass is made of operators: gradients appear
    as they are computed, and what a node saved disappears as the pass goes by. Only where several
    gradients of one tensor are added up may it count one tensor too many: autograd would do that
    in place if nothing watched.
    """

    def __init__(self, *, block_bytes: int = 1) -> None:
        super().__init__()
        self._block_bytes = block_bytes
        # By the storage's address, which is given out again only after its reference has died.
        self._storages: dict[int, _Storage] = {}
        self._hooks: list[RemovableHandle] = []
        self.now = dict.fromkeys(CATEGORIES, 0)
        """Bytes alive, by category."""
        self.at_peak = dict(self.now)
        """Bytes by category when there were most in all."""
        self.largest = dict(self.now)
        """The most bytes of each category by itself, at whatever time."""
        self._peak_bytes = 0

    @property
    def now_bytes(self) -> int:
        """Bytes alive."""
        return sum(self.now.values())

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were ever alive."""
        return self._peak_bytes

    def register(self, category: str, tensors: Iterable[Tensor]) -> None:
        """Count these from now on, or from now on in this category."""
        for tensor in tensors:
            self._see(tensor, category)
        self.changed()

    def watch_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Count what a backward pass leaves in `.grad` as gradients, until this context ends.

        What was there before must be registered.
        """

        def move(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self.register(GRADIENTS, [parameter.grad])

        for parameter in parameters:
            if parameter.requires_grad:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(move))

    def __exit__(self, *exception: Any) -> None:
        """Stop counting new tensors."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        super().__exit__(*exception)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run, then count what is new."""
        kwargs = kwargs or {}
        for tensor in tensors_in((args, kwargs)):
            self._see(tensor)
        result = func(*args, **kwargs)
        for tensor in tensors_in(result):
            self._see(tensor)
        self.changed()
        return result

    def _see(self, tensor: Tensor, category: str | None = None) -> None:
        storage = tensor.untyped_storage()
        num_bytes = -(-storage.nbytes() // self._block_bytes) * self._block_bytes
        known = self._storages.get(storage._cdata)
        if known is None:
            known = _Storage(storage, self, category or ACTIVATIONS)
            self._storages[storage._cdata] = known
        elif (category or known.category, num_bytes) == (known.category, known.num_bytes):
            return
        self.now[known.category] -= known.num_bytes  # moved, or resized
        known.category, known.num_bytes = category or known.category, num_bytes
        self.now[known.category] += num_bytes

    def _forget(self, storage: "_Storage") -> None:
        del self._storages[storage.address]
        self.now[storage.category] -= storage.num_bytes

    def changed(self) -> None:
        """Called after every operator and registration, when the bytes may have changed."""
        for category, num_bytes in self.now.items():
            if num_bytes > self.largest[category]:
                self.largest[category] = num_bytes
        if self.now_bytes > self._peak_bytes:
            self._peak_bytes, self.at_peak = self.now_bytes, dict(self.now)


class _Storage(weakref.ref[torch.UntypedStorage]):
    """A reference that takes its bytes off the count when it dies."""

    __slots__ = ("address", "category", "num_bytes")

    def __new__(
        cls, storage: torch.UntypedStorage, counter: LiveBytes, category: str
    ) -> "_Storage":
        return super().__new__(cls, storage, counter._forget)

    def __init__(self, storage: torch.UntypedStorage, counter: LiveBytes, category: str) -> None:
        super().__init__(storage, counter._forget)  # type: ignore[call-arg]
        self.address, self.category, self.num_bytes = storage._cdata, category, 0


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors of an operator's arguments or results."""
    return [leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor)]


@dataclass
class Update:
    """The memory and the work of one update, of D or of G, with one micro-batch."""

    most: dict[tuple[str, int], int] = field(default_factory=dict)
    """(phase, bytes of gradients in it) → the most bytes of everything but gradients, parameters
    and optimizer state that lived at such a moment."""
    flops: Counter[str] = field(default_factory=Counter)
    """Executed in each phase: convolutions and matrix products, two per multiply-add."""
    moved: Counter[str] = field(default_factory=Counter)
    """Bytes of each operator's arguments and results, in each phase."""
    most_values: int = 0
    """Number of values of the largest tensor that an operator reads or writes."""


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
    """Live bytes, and the most of them beside every amount of gradients, by phase of an update."""

    def __init__(self, phases: Phases, *, block_bytes: int) -> None:
        super().__init__(block_bytes=block_bytes)
        self._phases = phases
        self._update: Update | None = None

    @contextmanager
    def counted_for(self, update: Update) -> Iterator[None]:
        """Until the context ends, `update` notes the most bytes."""
        self._update = update
        try:
            yield
        finally:
            self._update = None

    def changed(self) -> None:
        """Take note."""
        super().changed()
        if self._update is None:
            return
        key = self._phases.now, self.now[GRADIENTS]
        if self.now[ACTIVATIONS] > self._update.most.get(key, -1):
            self._update.most[key] = self.now[ACTIVATIONS]


class WorkByPhase(TorchDispatchMode):
    """FLOPs of one update, and bytes that its operators read and write.

    It counts FLOPs as `FlopCounterMode` does, whose hooks on modules would keep tensors alive.
    """

    def __init__(self, update: Update, phases: Phases) -> None:
        super().__init__()
        self._update, self._phases = update, phases

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run, then count."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self._update.flops[self._phases.now] += formula(*args, **kwargs, out_val=result)
        read, written = tensors_in((args, kwargs)), tensors_in(result)
        largest = max((tensor.numel() for tensor in read + written), default=0)
        self._update.most_values = max(self._update.most_values, largest)
        if read and not _is_view(func, read, written):
            self._update.moved[self._phases.now] += _moved_bytes(func, args, read, written)
        return result


def _moved_bytes(func: Any, args: Any, read: list[Tensor], written: list[Tensor]) -> int:
    """The bytes that an operator reads and writes; a tensor changed in place counts for both."""
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
    """Lays a convolution's result out channels last where its input is, as cuDNN and oneDNN do.

    PyTorch's meta convolution answers in another layout than the real one, and the networks would
    seem to copy its result.
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
