"""FLOPs and bytes of one training step, counted operator by operator while it runs.

FLOPs are two per multiply-add of the convolutions and matrix products that are executed, by the
formulas of `torch.utils.flop_counter`, to which kernels/ adds those of our own operators. Matrix
times vector and elementwise work are not in them. Bytes count every input and output of an operator
once, and once a tensor that it changes in place without returning it. Views move nothing, and
caches are not seen.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import kernels.flop_formulas  # noqa: F401 — our operators' are in the registry, too
from engine.trainer.profiling.places import (
    BACKWARD,
    FORWARD,
    OTHER,
    RECOMPUTED,
    Place,
    Range,
    kind_of,
)

_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_VIEWS_UNDECLARED = {"_reshape_alias", "_unsafe_view", "lift_fresh"}
_WRITE_ONLY = {"copy_", "fill_", "zero_", "normal_", "uniform_"}


@dataclass
class CountedWork:
    """The work of all operators at one place."""

    flops: int = 0
    num_bytes: int = 0


@dataclass(frozen=True)
class _Entered:
    update: str
    part: str
    in_node: bool
    """Entered in the backward pass: by a block that is computed again."""


class OperatorCounter(TorchDispatchMode):
    """Counts every operator that runs inside `with`, at its place.

    `enter` and `leave` are for `named_parts`. A backward operator belongs to the part in which its
    node of autograd's graph was made; nodes are numbered in the order in which they are made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counted: dict[Place, CountedWork] = defaultdict(CountedWork)
        self._stack = [_Entered(*Place()[:2], in_node=False)]
        # From which node on the nodes belong to which part.
        self._first_nodes = [0]
        self._parts = [self._stack[0].part]

    def enter(self, entered: Range) -> None:
        """What runs from now on belongs to this range."""
        top, in_node = self._stack[-1], torch._C._current_autograd_node() is not None
        self._stack.append(
            _Entered(entered.update or top.update, entered.part or top.part, in_node)
        )
        self._note_part(in_node)

    def leave(self) -> None:
        """Back to the range around it."""
        self._note_part(self._stack.pop().in_node)

    def _note_part(self, in_node: bool) -> None:
        # Nodes of a recomputation are only looked into, never run.
        if not in_node:
            self._first_nodes.append(torch._C._autograd._get_sequence_nr())
            self._parts.append(self._stack[-1].part)

    def _place(self, kind: str) -> Place:
        top, node = self._stack[-1], torch._C._current_autograd_node()
        if node is None:
            return Place(top.update, top.part, FORWARD, kind)
        if top.in_node:
            return Place(top.update, top.part, RECOMPUTED, kind)
        # What accumulates a parameter's gradient has the largest number of all: it belongs to the
        # range that was entered last, the one around the backward pass.
        position = bisect_right(self._first_nodes, node._sequence_nr())
        return Place(top.update, self._parts[position - 1], BACKWARD, kind)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run, then count."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        num_bytes = moved_bytes(func, tree_leaves((args, kwargs)), tree_leaves(result))
        formula = flop_registry.get(func._overloadpacket)
        flops = 0 if formula is None else int(formula(*args, **kwargs, out_val=result))
        if num_bytes or flops:
            counted = self.counted[self._place(kind_of(func._schema.name) or OTHER)]
            counted.flops += flops
            counted.num_bytes += num_bytes
        return result


def moved_bytes(func: Any, inputs: Iterable[Any], outputs: Iterable[Any]) -> int:
    """The bytes that an operator reads and writes at least; 0 for views and allocations."""
    schema = func._schema
    name = schema.name.partition("::")[2]
    # A view's output is its input's memory, and is not written to.
    aliases = [out.alias_info for out in schema.returns if out.alias_info is not None]
    is_view = any(not alias.is_write for alias in aliases)
    if is_view or name in _ALLOCATIONS or name in _VIEWS_UNDECLARED:
        return 0
    read = [value for value in inputs if isinstance(value, Tensor)]
    written = [value for value in outputs if isinstance(value, Tensor)]
    total = sum(_touched(value) for value in read + written)
    if name in _WRITE_ONLY:  # the first argument is returned, and was not read
        total -= _touched(read[0])
    return total


def _touched(tensor: Tensor) -> int:
    """Bytes of memory behind a tensor; a repeated one's once."""
    num_values = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        num_values *= 1 if stride == 0 and size else size
    return num_values * tensor.element_size()
