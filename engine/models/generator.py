"""Generators: the trunk that all share, and the one that makes a whole clip from noise.

Shapes: B batch, Z latent size, K condition size (latent + class embedding), T frames, C channels,
H x W pixels. Videos are [B, T, 3, H, W] in [-1, 1].
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import kernels
from engine.models.blocks import GeneratorUnit, RecurrentBlock, Temporal
from engine.models.features import Features
from engine.models.layers import Convolution, Embedding, Linear
from engine.models.norms import FrameNorm, frame_norms, modulated_norms
from engine.models.operators import operators_of
from engine.models.spectral import normalized_weights

BASE_RESOLUTION = 4


class GeneratorTrunk(nn.Module):
    """From latent and label to a video, through units of temporal module and two 2D blocks.

    The generators of SSW-GAN. `multipliers` are the units' output channels in
    units of `channels`. Decided: the first log2(resolution / 4) units upsample; the paper's "all
    but the last" cannot reach 128x128 in five units.

    `compute_dtype` is what activations are in; weights, statistics and the output are fp32.
    """

    def __init__(
        self,
        *,
        resolution: int,
        channels: int,
        multipliers: Sequence[int],
        temporal: Temporal,
        num_classes: int | None = None,
        low_resolution: int | None = None,
        latent_size: int = 128,
        class_embedding_size: int = 128,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        num_upsamplings = (resolution // BASE_RESOLUTION).bit_length() - 1
        if resolution != BASE_RESOLUTION << num_upsamplings or len(multipliers) < num_upsamplings:
            raise ValueError(
                f"{len(multipliers)} units cannot go from {BASE_RESOLUTION} to {resolution} pixels"
            )
        self.resolution, self.latent_size = resolution, latent_size
        self.compute_dtype = compute_dtype
        self.embedding = Embedding(num_classes, class_embedding_size) if num_classes else None
        condition_size = latent_size + (class_embedding_size if num_classes else 0)
        self.base_channels = width = channels * multipliers[0]
        self.base = Linear(condition_size, BASE_RESOLUTION**2 * width)
        units = []
        for number, multiplier in enumerate(multipliers):
            units.append(
                GeneratorUnit(
                    width,
                    channels * multiplier,
                    condition_size,
                    temporal=temporal,
                    upsample=number < num_upsamplings,
                    resolution=BASE_RESOLUTION << min(number, num_upsamplings),
                    low_resolution=low_resolution,
                )
            )
            width = channels * multiplier
        self.units = nn.ModuleList(units)
        self.norm = FrameNorm(width, condition_size, is_last=True)
        self.to_rgb = Convolution(width, 3)

    def condition(self, z_BZ: Tensor, labels_B: Tensor | None) -> Tensor:
        """[z; e(y)], fp32. Raises ValueError when labels and the network do not fit together."""
        if z_BZ.ndim != 2 or z_BZ.shape[1] != self.latent_size:
            raise ValueError(f"z must be [B, {self.latent_size}], not {tuple(z_BZ.shape)}")
        if (labels_B is None) != (self.embedding is None):
            raise ValueError(
                "a class-conditional generator needs labels"
                if labels_B is None
                else "an unconditional generator takes no labels"
            )
        z_BZ = z_BZ.float()
        return z_BZ if self.embedding is None else torch.cat([z_BZ, self.embedding(labels_B)], 1)

    def synthesize(
        self,
        z_BZ: Tensor,
        labels_B: Tensor | None,
        num_frames: int,
        low: Tensor | None,
        frames_BW: Tensor | None = None,
    ) -> Tensor:
        """The whole network; `low` is x_l or None. Returns [B, num_frames, 3, H, W], fp32.

        With `frames_BW` [B, W, 3, H, W], and from the last temporal module on nothing else.
        """
        with normalized_weights(self, self.compute_dtype):
            return self._synthesize(z_BZ, labels_B, num_frames, low, frames_BW)

    def _synthesize(
        self,
        z_BZ: Tensor,
        labels_B: Tensor | None,
        num_frames: int,
        low: Tensor | None,
        frames_BW: Tensor | None,
    ) -> Tensor:
        cond_BK = self.condition(z_BZ, labels_B)
        with modulated_norms(self, cond_BK):
            return self._grow(cond_BK, num_frames, low, frames_BW)

    def _grow(
        self, cond_BK: Tensor, num_frames: int, low: Tensor | None, frames_BW: Tensor | None
    ) -> Tensor:
        base = self.base(cond_BK.to(self.compute_dtype))
        base_BHWC = base.unflatten(1, (BASE_RESOLUTION, BASE_RESOLUTION, self.base_channels))
        # A stride of 0 over T tells the first ConvGRU that its input does not change in time.
        h = Features(base_BHWC.permute(0, 3, 1, 2)[:, None].expand(-1, num_frames, -1, -1, -1))
        for unit in self.units[:-1]:
            h = unit(h, cond_BK, low)
        h = self.units[-1](h, cond_BK, low, frames_BW)
        rgb: Features = self.to_rgb(self.norm(h, cond_BK))
        return torch.tanh(rgb.video.float())


class ClipGenerator(GeneratorTrunk):
    """Makes a clip of any length from noise: stage 1 of SSW-GAN, and DVD-GAN's only stage."""

    def forward(
        self,
        z_BZ: Tensor,
        labels_B: Tensor | None,
        num_frames: int,
        frames_BW: Tensor | None = None,
    ) -> Tensor:
        """Returns [B, num_frames, 3, resolution, resolution] in [-1, 1], fp32.

        With `frames_BW` only these frames of each sample's clip, [B, W, 3, ...]. Raises UserError
        where norm statistics are fixed for another number of frames.
        """
        self.norm.check_length(num_frames)  # a norm that sees some frames only cannot
        if frames_BW is None or self.can_leave_frames_out:
            return self.synthesize(z_BZ, labels_B, num_frames, None, frames_BW)
        video = Features(self.synthesize(z_BZ, labels_B, num_frames, None))
        return video.only(frames_BW).video

    @property
    def can_leave_frames_out(self) -> bool:
        """Whether no frame depends on another behind the last unit's temporal module.

        Those of a batch do where norms take its statistics, or where 3D convolutions stand there.
        Operators other than `kernels` are not asked for what each frame's own statistics take.
        """
        last = self.units[-1]
        norms = (*frame_norms(last).values(), self.norm)
        recurrent = isinstance(last.temporal, RecurrentBlock)
        fixed = all(norm.mean is not None for norm in norms)
        return recurrent and fixed and operators_of(self) is kernels
