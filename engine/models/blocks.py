"""Residual blocks of generators and discriminators, and the generator's units.

A discriminator's block takes and returns videos [B, T, C, H, W], a generator's block `Features`: a
video, with its moments where these are known. `cond_BK` is the condition [z; e(y)], `low` the
low-resolution video x_l at its own size and length.
"""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from engine.models.activation_checkpointing import Block, run_block
from engine.models.features import Features
from engine.models.layers import (
    ConvGRU,
    Convolution,
    Injection,
    NoInjection,
    SeparableConvolution,
    Shortcut,
)
from engine.models.norms import FrameNorm
from engine.models.operators import OperatorLayer

Temporal = Literal["conv_gru", "separable_conv"]


class GeneratorBlock2D(Block):
    """norm-ReLU-(2x up)-conv3x3-norm-ReLU-conv3x3 plus shortcut, frames one by one.

    The first convolution changes the channels. The shortcut is a 1x1 convolution where channels
    change or the block upsamples, else the identity.
    """

    def __init__(
        self, in_channels: int, channels: int, condition_size: int, *, upsample: bool, inject: bool
    ) -> None:
        super().__init__()
        resample: Literal["up"] | None = "up" if upsample else None
        self.norm1 = FrameNorm(in_channels, condition_size)
        self.conv1 = Convolution(in_channels, channels, resample=resample)
        self.norm2 = FrameNorm(channels, condition_size)
        self.conv2 = Convolution(channels, channels)
        changes = upsample or in_channels != channels
        self.shortcut: nn.Module = (
            Shortcut(in_channels, channels, resample=resample) if changes else nn.Identity()
        )
        self.injection = Injection(channels) if inject else NoInjection()

    def forward(self, x: Features, cond_BK: Tensor, low: Tensor | None) -> Features:
        """Returns [B, T, channels, H, W], or 2H x 2W when upsampling."""
        h = self.conv1(self.norm1(x, cond_BK))
        y: Features = self.conv2(
            self.norm2(h, cond_BK),
            residual=self.shortcut(x.video),
            skip=self.injection(low, x.video),
        )
        return y

    @property
    def end(self) -> Convolution:
        """The last convolution."""
        return self.conv2


class GeneratorBlock3D(Block):
    """norm-ReLU-conv-norm-ReLU-conv plus identity, each conv a separable 3D one."""

    def __init__(self, channels: int, condition_size: int, *, inject: bool) -> None:
        super().__init__()
        self.norm1 = FrameNorm(channels, condition_size)
        self.conv1 = SeparableConvolution(channels, channels)
        self.norm2 = FrameNorm(channels, condition_size)
        self.conv2 = SeparableConvolution(channels, channels)
        self.injection = Injection(channels) if inject else NoInjection()

    def forward(self, x: Features, cond_BK: Tensor, low: Tensor | None) -> Features:
        """Returns the shape of x."""
        h = self.conv1(self.norm1(x, cond_BK))
        y: Features = self.conv2(
            self.norm2(h, cond_BK), residual=x.video, skip=self.injection(low, x.video)
        )
        return y

    @property
    def end(self) -> SeparableConvolution:
        """The last convolution."""
        return self.conv2


class RecurrentBlock(OperatorLayer, Block):
    """A ConvGRU; in an upsampling generator (Appendix C) x_l is added to its hidden states.

    Decided: the paper injects after 3D blocks and is silent on the ConvGRU in their place. x_l is
    added outside the recurrence, so that only the temporal module differs in the comparison.
    """

    def __init__(self, channels: int, *, inject: bool) -> None:
        super().__init__()
        self.gru = ConvGRU(channels)
        self.injection = Injection(channels) if inject else NoInjection()

    def forward(self, x: Features, cond_BK: Tensor, low: Tensor | None) -> Features:
        """Returns the shape of x; the condition is not used."""
        h: Tensor = self.gru(x.video)
        skip = self.injection(low, h)
        return Features(h if skip is None else self.operators.add_low_skip(h, skip))


class GeneratorUnit(nn.Module):
    """A temporal module and two 2D blocks; the second changes channels and upsamples.

    `resolution` is the unit's input size in pixels. With `low_resolution`, x_l is injected after
    each of these blocks whose output is no larger than x_l.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        condition_size: int,
        *,
        temporal: Temporal,
        upsample: bool,
        resolution: int,
        low_resolution: int | None,
    ) -> None:
        super().__init__()
        out_resolution = 2 * resolution if upsample else resolution
        inner = low_resolution is not None and resolution <= low_resolution
        outer = low_resolution is not None and out_resolution <= low_resolution
        self.temporal: Block = (
            RecurrentBlock(in_channels, inject=inner)
            if temporal == "conv_gru"
            else GeneratorBlock3D(in_channels, condition_size, inject=inner)
        )
        self.block1 = GeneratorBlock2D(
            in_channels, in_channels, condition_size, upsample=False, inject=inner
        )
        self.block2 = GeneratorBlock2D(
            in_channels, channels, condition_size, upsample=upsample, inject=outer
        )

    def forward(
        self, x: Features, cond_BK: Tensor, low: Tensor | None, frames_BW: Tensor | None = None
    ) -> Features:
        """Returns [B, T, channels, H, W], or 2H x 2W when upsampling.

        With `frames_BW` only these frames of each sample leave the temporal module.
        """
        h: Features = run_block(self.temporal, x, cond_BK, low)
        if frames_BW is not None:
            h = h.only(frames_BW)
        h = run_block(self.block1, h, cond_BK, low)
        return run_block(self.block2, h, cond_BK, low)


class DiscriminatorBlock(Block):
    """(ReLU)-conv-ReLU-conv-(pool) plus a pooled 1x1 shortcut, without norm; 2D or 3x3x3.

    The first block of a discriminator has no leading ReLU: it reads pixels. `pooling` is (1, 2, 2),
    or (2, 2, 2) in a volumetric block, or None. The shortcut pools before its 1x1 convolution,
    which commutes and costs a quarter.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        volumetric: bool,
        leading_relu: bool,
        pooling: kernels.Pooling | None,
    ) -> None:
        super().__init__()
        self.leading_relu = leading_relu
        kernel_size = (3, 3, 3) if volumetric else (3, 3)
        self.conv1 = Convolution(in_channels, channels, kernel_size)
        self.conv2 = Convolution(channels, channels, kernel_size, resample=pooling)
        # Decided: a 1x1 convolution in every block, also where channels stay and nothing pools.
        self.shortcut = Shortcut(in_channels, channels, resample=pooling)

    def forward(self, x_BTCHW: Tensor) -> Tensor:
        """Returns [B, T, channels, H, W], or T, H and W halved as `pooling` says."""
        residual = self.shortcut(x_BTCHW)
        h = F.relu(x_BTCHW) if self.leading_relu else x_BTCHW
        y: Tensor = self.conv2(self.conv1(h, relu=True), residual=residual)
        return y

    @property
    def end(self) -> Convolution:
        """The last convolution."""
        return self.conv2
