"""What a network keeps of its activations for the backward pass, and what it makes there again.

| `training.checkpointing` | kept                                                            |
|--------------------------|-----------------------------------------------------------------|
| none                     | all that a gradient reads, results of norms included            |
| norms                    | a norm's input instead of its result, which is computed again   |
| blocks                   | a block's inputs; the block is computed again up to its last    |
|                          | convolution, because nobody reads that one's result             |

All three compute the same, bit for bit: a block computed again divides its weights by the same σ
(power iteration is no part of a pass) and draws nothing at random.
"""

from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from engine.models.layers import BlockEnd
from engine.models.norms import frame_norms
from engine.models.prepared import prepared_now

Checkpointing = Literal["none", "norms", "blocks"]


class Block(nn.Module):
    """A part of a network that can be computed again as a whole; to be called by `run_block`."""

    recomputed = False
    """Whether its backward pass computes it again."""

    @property
    def end(self) -> BlockEnd | None:
        """The block's last layer, if it makes the block's result, which nobody reads in a pass that
        is made again."""
        return None


def run_block(block: Block, *inputs: Any) -> Any:
    """`block(*inputs)`; where it is `recomputed`, only `inputs` are kept for its backward pass."""
    if not (block.recomputed and torch.is_grad_enabled()):
        return block(*inputs)
    # Computing again comes after the pass: it is to see the very tensors that are prepared now.
    prepared = prepared_now(block)
    # Flat: PyTorch hands only tensors that are arguments themselves to hooks of saved tensors.
    leaves, structure = tree_flatten(inputs)
    end, again = block.end, False

    def run(*leaves: Any) -> Any:
        nonlocal again
        if end is not None:
            end.recomputing = again
        again = True
        try:
            return block(*tree_unflatten(leaves, structure))
        finally:
            if end is not None:
                end.recomputing = False

    return checkpoint(
        run,
        *leaves,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), prepared),
    )


def set_checkpointing(network: nn.Module, mode: Checkpointing) -> None:
    """From now on, keep what `mode` says; networks begin with "norms"."""
    for norm in frame_norms(network).values():
        norm.keeps_result = mode == "none"
    for module in network.modules():
        if isinstance(module, Block):
            module.recomputed = mode == "blocks"
