"""A block of your own, made of the engine's layers.

Shows that every weight of it is spectrally normalised, and that its backward pass may compute it
again with the same gradients. Needs no GPU and no data:

    python docs/examples/custom_block.py
"""

import torch
from torch import Tensor

import kernels
from engine.models import layers
from engine.models.activation_checkpointing import Block, run_block
from engine.models.norms import Features, FrameNorm


class GatedBlock(Block):
    """x + gate(cond) · conv(relu(norm(x))); conv is separable and 3D, cond [B, size]."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.norm, self.gate = FrameNorm(channels, size), layers.Linear(size, channels)
        self.conv = layers.SeparableConvolution(channels, channels)

    def forward(self, x_BTCHW: Tensor, cond_BK: Tensor) -> Tensor:
        """Returns the shape of x."""
        normalized = self.norm(Features(x_BTCHW), cond_BK)  # not computed yet, nor kept
        h_BTCHW = kernels.separable_conv3d(normalized, *self.conv(x_BTCHW.dtype))
        return x_BTCHW + self.gate(cond_BK).sigmoid()[:, None, :, None, None] * h_BTCHW


if __name__ == "__main__":
    block, x_BTCHW, cond_BK = GatedBlock(16, 8), torch.randn(2, 6, 16, 8, 8), torch.randn(2, 8)
    layers.update_spectral_norm(block)  # power iteration, once per optimizer step
    for block.recomputed in (False, True):  # training.checkpointing: norms, then blocks
        with layers.normalized_weights(block, torch.float32):  # each over its σ, all at once
            y_BTCHW = run_block(block, x_BTCHW, cond_BK)
        gradients = torch.autograd.grad(y_BTCHW.square().mean(), list(block.parameters()))
        print(f"{list(y_BTCHW.shape)}, gradients add up to {sum(g.sum() for g in gradients):.8f}")
