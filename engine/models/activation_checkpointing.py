"""What a network keeps of its activations for the backward pass, and what it makes there again.

| `training.checkpointing` | kept                                                            |
|--------------------------|-----------------------------------------------------------------|
| none                     | whatever a gradient reads, norms' results among it              |
| norms                    | of a norm with its ReLU only the input; a pass of arithmetic    |
| blocks                   | of a block only the inputs; its forward pass is computed twice  |

All three compute the same, bit for bit: a block computed again divides its weights by the same σ
(power iteration is no part of a pass) and draws nothing at random.
"""

from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from engine.models.layers import prepared_weights
from engine.models.norms import frame_norms

Checkpointing = Literal["none", "norms", "blocks"]


class Block(nn.Module):
    """A part of a network that can be computed again as a whole; to be called by `run_block`."""

    recomputed = False


def run_block(block: nn.Module, *inputs: Any) -> Any:
    """`block(*inputs)`; where it is `recomputed`, only `inputs` are kept for its backward pass."""
    if not (block.recomputed and torch.is_grad_enabled()):
        return block(*inputs)
    # Computing again comes after the pass: it is to see the very weights that are prepared now.
    weights = prepared_weights(block)
    return checkpoint(
        block,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), weights),
    )


def set_checkpointing(network: nn.Module, mode: Checkpointing) -> None:
    """From now on, keep what `mode` says; networks begin with "norms"."""
    for norm in frame_norms(network).values():
        norm.keeps_result = mode == "none"
    for module in network.modules():
        if isinstance(module, Block):
            module.recomputed = mode == "blocks"
