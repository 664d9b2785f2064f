"""What a network keeps of its activations for the backward pass, and what it makes there again.

| `training.checkpointing` | kept                                                            |
|--------------------------|-----------------------------------------------------------------|
| none                     | whatever a gradient reads, norms' results among it              |
| norms                    | of a norm with its ReLU only the input; a pass of arithmetic    |
| blocks                   | of a block only the inputs; all is computed twice that lies     |
|                          | before its last convolution, whose result nobody reads again    |

All three compute the same, bit for bit: a block computed again divides its weights by the same σ
(power iteration is no part of a pass) and draws nothing at random.
"""

from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from engine.models.layers import NormalizedWeights, prepared_weights
from engine.models.norms import frame_norms

Checkpointing = Literal["none", "norms", "blocks"]


class Block(nn.Module):
    """A part of a network that can be computed again as a whole; to be called by `run_block`."""

    recomputed = False
    """Whether its backward pass computes it again."""
    recomputing = False
    """Whether it is being computed again at this moment."""

    @property
    def only_graph(self) -> bool:
        """Whether this pass is for the graph of the backward pass alone: nobody reads its result.

        PyTorch ends such a pass when the last tensor is kept; a Function's are kept after it ran.
        """
        # A compiled block's two passes must be one program, which keeps the same tensors.
        return not torch.compiler.is_compiling() and self.recomputing


class Recomputing(AbstractContextManager["Recomputing"]):
    """Within this context, any number of times, a block is computed again, with these weights."""

    def __init__(self, block: Block, weights: NormalizedWeights) -> None:
        self._block, self._weights = block, weights

    def __enter__(self) -> "Recomputing":
        self._block.recomputing = True
        self._weights.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._weights.__exit__(kind, value, traceback)
        self._block.recomputing = False


def run_block(block: Block, *inputs: Any) -> Any:
    """`block(*inputs)`; where it is `recomputed`, only `inputs` are kept for its backward pass."""
    if not (block.recomputed and torch.is_grad_enabled()):
        return block(*inputs)
    # Computing again comes after the pass: it is to see the very weights that are prepared now.
    weights = prepared_weights(block)
    # Flat: PyTorch hands only tensors that are arguments themselves to hooks of saved tensors.
    leaves, structure = tree_flatten(inputs)
    return checkpoint(
        lambda *leaves: block(*tree_unflatten(leaves, structure)),
        *leaves,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), Recomputing(block, weights)),
    )


def set_checkpointing(network: nn.Module, mode: Checkpointing) -> None:
    """From now on, keep what `mode` says; networks begin with "norms"."""
    for norm in frame_norms(network).values():
        norm.keeps_result = mode == "none"
    for module in network.modules():
        if isinstance(module, Block):
            module.recomputed = mode == "blocks"
