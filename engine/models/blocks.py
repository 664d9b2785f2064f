"""Residual blocks of generators and discriminators, and the generator's units.

Everything takes and returns videos [B, T, C, H, W], the generator's with their moments where these
are known; `cond_BK` is the condition [z; e(y)] and `low` the low-resolution video x_l at its own
size and length.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from engine.models.activation_checkpointing import Block, run_block
from engine.models.layers import ConvGRU, Convolution, SeparableConvolution
from engine.models.norms import Features, FrameNorm

Temporal = Literal["conv_gru", "separable_conv"]
LOW_CHANNELS = 3  # x_l is RGB


class Injection(nn.Module):
    """The 1x1 convolution that adds x_l to a block's output (SSW-GAN, upsampling stages)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.projection = Convolution(LOW_CHANNELS, channels, (1, 1))

    def forward(self, low: Tensor, dtype: torch.dtype) -> kernels.LowSkip:
        """What the block's last operator adds."""
        return kernels.LowSkip(low, *self.projection(dtype))


def _skip(
    injection: Injection | None, low: Tensor | None, dtype: torch.dtype
) -> kernels.LowSkip | None:
    if injection is None:
        return None
    if low is None:
        raise ValueError("this block injects a low-resolution video, but was given none")
    skip: kernels.LowSkip = injection(low, dtype)
    return skip


class GeneratorBlock2D(Block):
    """norm-ReLU-(2x up)-conv3x3-norm-ReLU-conv3x3 plus shortcut, frames one by one.

    The first convolution changes the channels. The shortcut is a 1x1 convolution where channels
    change or the block upsamples, else the identity.
    """

    def __init__(
        self, in_channels: int, channels: int, condition_size: int, *, upsample: bool, inject: bool
    ) -> None:
        super().__init__()
        self.upsample = upsample
        self.norm1 = FrameNorm(in_channels, condition_size)
        self.conv1 = Convolution(in_channels, channels, fold="upsampling" if upsample else None)
        self.norm2 = FrameNorm(channels, condition_size)
        self.conv2 = Convolution(channels, channels)
        changes = upsample or in_channels != channels
        self.shortcut = Convolution(in_channels, channels, (1, 1)) if changes else None
        self.injection = Injection(channels) if inject else None

    def forward(self, x: Features, cond_BK: Tensor, low: Tensor | None) -> Features:
        """Returns [B, T, channels, H, W], or 2H x 2W when upsampling."""
        dtype = x.video.dtype
        # What upsamples folds the weight in the precision it is kept in, and only then rounds it.
        kept = None if self.upsample else dtype
        first = kernels.upsample_conv_with_moments if self.upsample else kernels.conv2d_with_moments
        wanted = self.norm2.takes_moments  # and so will the norm that comes after the block
        h = Features(*first(self.norm1(x, cond_BK), *self.conv1(kept), wanted=wanted), x.frames_BT)
        y, moments = kernels.conv2d_with_moments(
            self.norm2(h, cond_BK),
            *self.conv2(dtype),
            residual_BTOHW=self._residual(x.video),
            skip=_skip(self.injection, low, dtype),
            only_graph=self.only_graph,
            wanted=wanted,
        )
        return Features(y, moments, x.frames_BT)

    def _residual(self, x_BTCHW: Tensor) -> Tensor | kernels.UpsampledShortcut:
        if self.shortcut is None:
            return x_BTCHW
        weight, bias = self.shortcut(x_BTCHW.dtype)
        if self.upsample:
            return kernels.UpsampledShortcut(x_BTCHW, weight, bias)
        return kernels.conv2d(x_BTCHW, weight, bias)


class GeneratorBlock3D(Block):
    """norm-ReLU-conv-norm-ReLU-conv plus identity, each conv a separable 3D one."""

    def __init__(self, channels: int, condition_size: int, *, inject: bool) -> None:
        super().__init__()
        self.norm1 = FrameNorm(channels, condition_size)
        self.conv1 = SeparableConvolution(channels, channels)
        self.norm2 = FrameNorm(channels, condition_size)
        self.conv2 = SeparableConvolution(channels, channels)
        self.injection = Injection(channels) if inject else None

    def forward(self, x: Features, cond_BK: Tensor, low: Tensor | None) -> Features:
        """Returns the shape of x."""
        dtype = x.video.dtype
        wanted = self.norm2.takes_moments
        h = Features(
            *kernels.separable_conv3d_with_moments(
                self.norm1(x, cond_BK), *self.conv1(dtype), wanted=wanted
            )
        )
        y, moments = kernels.separable_conv3d_with_moments(
            self.norm2(h, cond_BK),
            *self.conv2(dtype),
            residual_BTOHW=x.video,
            skip=_skip(self.injection, low, dtype),
            only_graph=self.only_graph,
            wanted=wanted,
        )
        return Features(y, moments)


class RecurrentBlock(Block):
    """A ConvGRU; in an upsampling generator (Appendix C) x_l is added to its hidden states.

    Decided: the paper injects after 3D blocks and is silent on the ConvGRU in their place. x_l is
    added outside the recurrence, so that the block is exactly the replacement that is compared.
    """

    def __init__(self, channels: int, *, inject: bool) -> None:
        super().__init__()
        self.gru = ConvGRU(channels)
        self.injection = Injection(channels) if inject else None

    def forward(self, x: Features, cond_BK: Tensor, low: Tensor | None) -> Features:
        """Returns the shape of x; the condition is not used."""
        h: Tensor = self.gru(x.video)
        skip = _skip(self.injection, low, h.dtype)
        return Features(h if skip is None else kernels.add_low_skip(h, skip))


class GeneratorUnit(nn.Module):
    """A temporal module and two 2D blocks; the second changes channels and upsamples.

    `resolution` is the unit's input size in pixels. With `low_resolution`, x_l is injected after
    each of the three whose output is no larger than x_l.
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
        self.volumetric, self.leading_relu, self.pooling = volumetric, leading_relu, pooling
        kernel_size = (3, 3, 3) if volumetric else (3, 3)
        self.conv1 = Convolution(in_channels, channels, kernel_size)
        fold = pooling if volumetric or pooling is None else pooling[1:]
        self.conv2 = Convolution(channels, channels, kernel_size, fold=fold)
        # Decided: a 1x1 convolution in every block, also where channels stay and nothing pools.
        self.shortcut = Convolution(in_channels, channels, (1, 1))

    def forward(self, x_BTCHW: Tensor) -> Tensor:
        """Returns [B, T, channels, H, W], or T, H and W halved as `pooling` says."""
        dtype, pooling = x_BTCHW.dtype, self.pooling
        conv = kernels.conv3d if self.volumetric else kernels.conv2d
        residual = x_BTCHW if pooling is None else kernels.average_pool(x_BTCHW, pooling)
        residual = kernels.conv2d(residual, *self.shortcut(dtype))
        h = F.relu(x_BTCHW) if self.leading_relu else x_BTCHW
        h = conv(h, *self.conv1(dtype), relu=True)
        end: dict[str, Any] = {"residual_BTOHW": residual, "only_graph": self.only_graph}
        if pooling is None:
            return conv(h, *self.conv2(dtype), **end)
        # The weight as it is kept, in fp32: pooling is folded into it, and only then it is rounded.
        weight, bias = self.conv2(None)
        if not self.volumetric:
            return kernels.conv_pool2d(h, weight, bias, **end)
        return kernels.conv_pool3d(h, weight, bias, **end, pooling=pooling)
