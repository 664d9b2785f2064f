"""A block of your own, made of the engine's layers.

Shows that every weight of it is spectrally normalised, and that its backward pass may compute it
again with the same gradients. Needs no GPU and no data:

    python docs/examples/custom_block.py
"""

import torch
from torch import Tensor

from engine.models import layers, spectral
from engine.models.activation_checkpointing import Block, run_block
from engine.models.features import Features
from engine.models.norms import FrameNorm


class GatedBlock(Block):
    """x + gate(cond) · conv(relu(norm(x))); conv is separable and 3D, cond [B, size]."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.norm, self.gate = FrameNorm(channels, size), layers.Linear(size, channels)
        self.conv = layers.SeparableConvolution(channels, channels)

    def forward(self, x_BTCHW: Tensor, cond_BK: Tensor) -> Tensor:
        """Returns the shape of x."""
        # The norm is not computed yet, nor kept: the convolution does it.
        h_BTCHW = self.conv(self.norm(Features(x_BTCHW), cond_BK)).video
        return x_BTCHW + self.gate(cond_BK).sigmoid()[:, None, :, None, None] * h_BTCHW


if __name__ == "__main__":
    block, x_BTCHW, cond_BK = GatedBlock(16, 8), torch.randn(2, 6, 16, 8, 8), torch.randn(2, 8)
    spectral.update_spectral_norm(block)  # power iteration, once per optimizer step
    for block.recomputed in (False, True):  # training.checkpointing: norms, then blocks
        with spectral.normalized_weights(block, torch.float32):  # each over its σ, all at once
            y_BTCHW = run_block(block, x_BTCHW, cond_BK)
        gradients = torch.autograd.grad(y_BTCHW.square().mean(), list(block.parameters()))
        print(f"{list(y_BTCHW.shape)}, gradients add up to {sum(g.sum() for g in gradients):.8f}")
