"""Discriminators: spatial, temporal and matching, and the set of them that a stage trains.

SSW-GAN, after DVD-GAN and BigGAN; the class enters by projection (Miyato and
Koyama 2018). Every score is of one frame or one time step.

Shapes: B batch, T frames, t frames of x_l, K frames drawn, C channels, H x W pixels, F features.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from engine.models.activation_checkpointing import Block, run_block
from engine.models.blocks import DiscriminatorBlock
from engine.models.layers import Embedding, Linear, normalized_weights
from engine.views import nearest_view

NUM_VOLUMETRIC_BLOCKS = 2
SMALLEST_RESOLUTION = 4


class Scores(NamedTuple):
    """What a stage's discriminators say, fp32, per sample and frame or time step."""

    spatial: Tensor
    """[B, K], of the frames drawn."""
    temporal: Tensor
    """[B, T], fewer where time is pooled."""
    matching: Tensor | None
    """[B, t], likewise, or None where the stage has no matching discriminator."""

    @property
    def all(self) -> Tensor:
        """Every score of every discriminator, [B, N]."""
        return torch.cat(list(self.by_name().values()), dim=1)

    def by_name(self) -> dict[str, Tensor]:
        """The scores of the discriminators that the stage has."""
        return {name: scores for name, scores in self._asdict().items() if scores is not None}


class ResidualTower(nn.Module):
    """Residual blocks, then relu, sum over space, linear score plus projection ⟨e(y), h⟩.

    Every block but the last pools. Decided: pooling ends at 4x4 pixels, where the generator
    begins, so that stage 1's five blocks (32x32) keep two at 4x4. With `num_volumetric` blocks at
    the input 3x3x3, the rest work on each time step by itself. Decided: the volumetric blocks
    pool space only, so that windows of three frames reach the scores; with `pool_time` they halve
    time as well.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        resolution: int,
        channels: int,
        multipliers: Sequence[int],
        num_volumetric: int,
        pool_time: bool = False,
        num_classes: int | None,
        compute_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.compute_dtype = compute_dtype
        blocks, width = [], in_channels
        for number, multiplier in enumerate(multipliers):
            volumetric = number < num_volumetric
            pool = number + 1 < len(multipliers) and resolution > SMALLEST_RESOLUTION
            pooling: kernels.Pooling = (2 if volumetric and pool_time else 1, 2, 2)
            blocks.append(
                DiscriminatorBlock(
                    width,
                    channels * multiplier,
                    volumetric=volumetric,
                    leading_relu=number > 0,
                    pooling=pooling if pool else None,
                )
            )
            width = channels * multiplier
            resolution = resolution // 2 if pool else resolution
        self.blocks = nn.ModuleList(blocks)
        self.score = Linear(width, 1, kept_dtype=True)
        self.embedding = Embedding(num_classes, width) if num_classes else None

    def forward(self, x_BTCHW: Tensor, labels_B: Tensor | None) -> Tensor:
        """Scores of every time step, [B, T] (pooled, T // 4), fp32."""
        if (labels_B is None) != (self.embedding is None):
            raise ValueError(
                "a class-conditional discriminator needs labels"
                if labels_B is None
                else "an unconditional discriminator takes no labels"
            )
        h = x_BTCHW.to(self.compute_dtype)
        for block in self.blocks:
            h = run_block(cast(Block, block), h)
        h_BTF = F.relu(h).float().sum(dim=(3, 4))
        scores_BT: Tensor = self.score(h_BTF).squeeze(2)
        if self.embedding is None:
            return scores_BT
        return scores_BT + torch.einsum("btf,bf->bt", h_BTF, self.embedding(labels_B))


class SpatialDiscriminator(nn.Module):
    """Judges some frames of a video, each alone."""

    def __init__(
        self,
        *,
        resolution: int,
        channels: int,
        multipliers: Sequence[int],
        num_classes: int | None = None,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.tower = ResidualTower(
            in_channels=3,
            resolution=resolution,
            channels=channels,
            multipliers=multipliers,
            num_volumetric=0,
            num_classes=num_classes,
            compute_dtype=compute_dtype,
        )

    def forward(
        self, video_BTCHW: Tensor, labels_B: Tensor | None, frame_indices_BK: Tensor
    ) -> Tensor:
        """Scores of the chosen frames, [B, K]; see `draw_frame_indices`."""
        samples = torch.arange(len(video_BTCHW), device=video_BTCHW.device)[:, None]
        frames_BKCHW = video_BTCHW[samples, frame_indices_BK.to(video_BTCHW.device)]
        scores_BK: Tensor = self.tower(frames_BKCHW, labels_B)
        return scores_BK


class TemporalDiscriminator(nn.Module):
    """Judges motion: the whole clip at half its resolution, first two blocks 3x3x3."""

    def __init__(
        self,
        *,
        resolution: int,
        channels: int,
        multipliers: Sequence[int],
        num_classes: int | None = None,
        pool_time: bool = False,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.tower = ResidualTower(
            in_channels=3,
            resolution=resolution // 2,
            channels=channels,
            multipliers=multipliers,
            num_volumetric=NUM_VOLUMETRIC_BLOCKS,
            pool_time=pool_time,
            num_classes=num_classes,
            compute_dtype=compute_dtype,
        )

    def forward(self, video_BTCHW: Tensor, labels_B: Tensor | None) -> Tensor:
        """Scores of every time step, [B, T]."""
        scores_BT: Tensor = self.tower(kernels.average_pool(video_BTCHW), labels_B)
        return scores_BT


class MatchingDiscriminator(nn.Module):
    """Judges whether a video belongs to its x_l: [f(video); x_l] at x_l's size and length."""

    def __init__(
        self,
        *,
        low_resolution: int,
        frame_step: int,
        channels: int,
        multipliers: Sequence[int],
        num_classes: int | None = None,
        pool_time: bool = False,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.low_resolution, self.frame_step = low_resolution, frame_step
        self.tower = ResidualTower(
            in_channels=6,
            resolution=low_resolution,
            channels=channels,
            multipliers=multipliers,
            num_volumetric=NUM_VOLUMETRIC_BLOCKS,
            pool_time=pool_time,
            num_classes=num_classes,
            compute_dtype=compute_dtype,
        )

    def forward(self, video_BTCHW: Tensor, labels_B: Tensor | None, low_BtChw: Tensor) -> Tensor:
        """Scores of x_l's time steps, [B, t]."""
        view = nearest_view(video_BTCHW, resolution=self.low_resolution, frame_step=self.frame_step)
        scores_Bt: Tensor = self.tower(torch.cat([view, low_BtChw.to(view.dtype)], 2), labels_B)
        return scores_Bt


class Discriminators(nn.Module):
    """All discriminators of one stage, as one network with one optimiser."""

    def __init__(
        self,
        spatial: SpatialDiscriminator,
        temporal: TemporalDiscriminator,
        matching: MatchingDiscriminator | None = None,
    ) -> None:
        super().__init__()
        self.spatial, self.temporal, self.matching = spatial, temporal, matching

    def forward(
        self,
        video_BTCHW: Tensor,
        labels_B: Tensor | None,
        low_BtChw: Tensor | None,
        frame_indices_BK: Tensor,
    ) -> Scores:
        """Judge videos; `low` is x_l, ignored by a stage that has no matching discriminator."""
        # All of a stage's discriminators compute in one dtype.
        with normalized_weights(self, self.spatial.tower.compute_dtype):
            matching = None
            if self.matching is not None:
                if low_BtChw is None:
                    raise ValueError("the matching discriminator needs the low-resolution video")
                matching = self.matching(video_BTCHW, labels_B, low_BtChw)
            return Scores(
                self.spatial(video_BTCHW, labels_B, frame_indices_BK),
                self.temporal(video_BTCHW, labels_B),
                matching,
            )


def draw_frame_indices(
    batch: int, num_frames: int, num_drawn: int, generator: torch.Generator | None = None
) -> Tensor:
    """For each sample min(num_drawn, num_frames) different frames; [B, K] int64.

    Uniform without replacement, on the generator's device (the CPU without one).
    """
    device = "cpu" if generator is None else generator.device
    order_BT = torch.rand(batch, num_frames, generator=generator, device=device).argsort(dim=1)
    return order_BT[:, :num_drawn]
