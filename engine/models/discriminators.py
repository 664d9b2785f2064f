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
from engine.models.layers import Embedding, Linear
from engine.models.operators import OperatorLayer
from engine.models.spectral import normalized_weights
from engine.views import nearest_view

NUM_VOLUMETRIC_BLOCKS = 2
SMALLEST_RESOLUTION = 4
_SMALLEST_VARIANCE = 1e-6


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

    With `minibatch_stddev` each score also has a linear term in how far the features of its class
    are spread over the batch, see `stddev_within_classes`: ours.
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
        minibatch_stddev: bool = False,
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
        self.stddev_score = (
            Linear(width, 1, bias=False, kept_dtype=True) if minibatch_stddev else None
        )

    def forward(self, x_BTCHW: Tensor, labels_B: Tensor | None, num_batches: int = 1) -> Tensor:
        """Scores of every time step, [B, T] (pooled, T // 4), fp32.

        `num_batches` as in `Discriminators`.
        """
        if (labels_B is None) != (self.embedding is None):
            raise ValueError(
                "a class-conditional discriminator needs labels"
                if labels_B is None
                else "an unconditional discriminator takes no labels"
            )
        h = x_BTCHW.to(self.compute_dtype)
        for block in self.blocks:
            h = run_block(cast(Block, block), h)
        h_BTFHW = F.relu(h).float()
        h_BTF = h_BTFHW.sum(dim=(3, 4))
        scores_BT: Tensor = self.score(h_BTF).squeeze(2)
        if self.embedding is not None:
            scores_BT = scores_BT + torch.einsum("btf,bf->bt", h_BTF, self.embedding(labels_B))
        if self.stddev_score is not None:
            stddev_BTFHW = stddev_within_classes(h_BTFHW, labels_B, num_batches)
            scores_BT = scores_BT + self.stddev_score(stddev_BTFHW.sum(dim=(3, 4))).squeeze(2)
        return scores_BT


def stddev_within_classes(h_BTFHW: Tensor, labels_B: Tensor | None, num_batches: int = 1) -> Tensor:
    """The standard deviation of each feature over the batch's samples of the same class.

    Minibatch standard deviation (Karras et al. 2018), but within classes, and neither averaged
    over places nor over features: it tells whether a class's samples differ in where and when
    something is, which a discriminator that judges each sample alone cannot see. It is that of
    the class for each of its samples, with Bessel's correction; for a sample without another of
    its class it is 0. `num_batches` as in `Discriminators`. Returns [B, T, F, H, W].
    """
    h_BN = h_BTFHW.flatten(1)
    batch = torch.arange(len(h_BN), device=h_BN.device) * num_batches // len(h_BN)
    same_BB = batch[:, None] == batch
    if labels_B is not None:
        same_BB = same_BB & (labels_B[:, None] == labels_B)
    weight_BB = same_BB.to(h_BN.dtype)
    count_B1 = weight_BB.sum(1, keepdim=True)
    centred_BN = h_BN - weight_BB @ h_BN / count_B1
    variance_BN = weight_BB @ centred_BN.square() / (count_B1 - 1).clamp_min(1)
    # The square root has no derivative at 0, where samples are equal or alone.
    deviation_BN = (variance_BN + _SMALLEST_VARIANCE).sqrt() - _SMALLEST_VARIANCE**0.5
    return deviation_BN.view_as(h_BTFHW)


class SpatialDiscriminator(nn.Module):
    """Judges some frames of a video, each alone."""

    def __init__(
        self,
        *,
        resolution: int,
        channels: int,
        multipliers: Sequence[int],
        num_classes: int | None = None,
        minibatch_stddev: bool = False,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.tower = ResidualTower(
            in_channels=3,
            resolution=resolution,
            channels=channels,
            multipliers=multipliers,
            num_volumetric=0,
            minibatch_stddev=minibatch_stddev,
            num_classes=num_classes,
            compute_dtype=compute_dtype,
        )

    def forward(
        self,
        video_BTCHW: Tensor,
        labels_B: Tensor | None,
        frame_indices_BK: Tensor,
        num_batches: int = 1,
    ) -> Tensor:
        """Scores of the chosen frames, [B, K]; see `draw_frame_indices`."""
        samples = torch.arange(len(video_BTCHW), device=video_BTCHW.device)[:, None]
        frames_BKCHW = video_BTCHW[samples, frame_indices_BK.to(video_BTCHW.device)]
        scores_BK: Tensor = self.tower(frames_BKCHW, labels_B, num_batches)
        return scores_BK


class TemporalDiscriminator(OperatorLayer):
    """Judges motion: the whole clip at half its resolution, first two blocks 3x3x3."""

    def __init__(
        self,
        *,
        resolution: int,
        channels: int,
        multipliers: Sequence[int],
        num_classes: int | None = None,
        pool_time: bool = False,
        minibatch_stddev: bool = False,
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
            minibatch_stddev=minibatch_stddev,
            num_classes=num_classes,
            compute_dtype=compute_dtype,
        )

    def forward(self, video_BTCHW: Tensor, labels_B: Tensor | None, num_batches: int = 1) -> Tensor:
        """Scores of every time step, [B, T]."""
        scores_BT: Tensor = self.tower(
            self.operators.average_pool(video_BTCHW), labels_B, num_batches
        )
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
        minibatch_stddev: bool = False,
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
            minibatch_stddev=minibatch_stddev,
            num_classes=num_classes,
            compute_dtype=compute_dtype,
        )

    def forward(
        self,
        video_BTCHW: Tensor,
        labels_B: Tensor | None,
        low_BtChw: Tensor,
        num_batches: int = 1,
    ) -> Tensor:
        """Scores of x_l's time steps, [B, t]."""
        view = nearest_view(video_BTCHW, resolution=self.low_resolution, frame_step=self.frame_step)
        pair = torch.cat([view, low_BtChw.to(view.dtype)], 2)
        scores_Bt: Tensor = self.tower(pair, labels_B, num_batches)
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
        num_batches: int = 1,
    ) -> Scores:
        """Judge videos; `low` is x_l, ignored by a stage that has no matching discriminator.

        What is given may be several batches of equal size, one after the other, such as reals and
        fakes; `num_batches` tells how many, for what looks at a batch as a whole.
        """
        # All of a stage's discriminators compute in one dtype.
        with normalized_weights(self, self.spatial.tower.compute_dtype):
            matching = None
            if self.matching is not None:
                if low_BtChw is None:
                    raise ValueError("the matching discriminator needs the low-resolution video")
                matching = self.matching(video_BTCHW, labels_B, low_BtChw, num_batches)
            return Scores(
                self.spatial(video_BTCHW, labels_B, frame_indices_BK, num_batches),
                self.temporal(video_BTCHW, labels_B, num_batches),
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
