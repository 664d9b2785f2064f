"""Bytes of all tensors that live, and the most that ever did, while some code runs.

Works on meta tensors, fake ones and real ones alike: it counts storages, each once, from the
operator that returns it first until nothing refers to it any more. Not seen: scratch memory inside
an operator, and what an operator of our own allocates and frees again before it returns.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.hooks import RemovableHandle

PARAMETERS, GRADIENTS, OPTIMIZER, ACTIVATIONS = CATEGORIES = (
    "parameters",
    "gradients",
    "optimizer",
    "activations",
)
"""The last one is everything else."""

CUDA_BLOCK_BYTES = 512
"""What PyTorch's CUDA allocator rounds every request up to."""


class LiveBytes(TorchDispatchMode):
    """A context in which the bytes of live tensors are counted.

    What existed before is counted once `register` names it, or an operator reads it. With
    `block_bytes` every storage is rounded up to a multiple of that.

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
