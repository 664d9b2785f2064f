"""The upsampling generator: stage 2 and later of SSW-GAN."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.models.blocks import LOW_CHANNELS, Temporal
from engine.models.generator import GeneratorTrunk


class UpsamplingGenerator(GeneratorTrunk):
    """Upsamples x_l, the previous stage's video, in space and time, guided by noise and label.

    Trained on short windows and convolutional in time, so that it runs over clips of any length.
    Output frames come `frame_step` to each input frame; see `GeneratorTrunk` for the rest.
    """

    def __init__(
        self,
        *,
        resolution: int,
        channels: int,
        multipliers: Sequence[int],
        temporal: Temporal,
        low_resolution: int,
        frame_step: int,
        num_classes: int | None = None,
        latent_size: int = 128,
        class_embedding_size: int = 128,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        if resolution % low_resolution or frame_step < 1:
            raise ValueError(
                f"cannot upsample {low_resolution} to {resolution} pixels and one frame to "
                f"{frame_step}"
            )
        super().__init__(
            resolution=resolution,
            channels=channels,
            multipliers=multipliers,
            temporal=temporal,
            num_classes=num_classes,
            low_resolution=low_resolution,
            latent_size=latent_size,
            class_embedding_size=class_embedding_size,
            compute_dtype=compute_dtype,
        )
        self.low_resolution, self.frame_step = low_resolution, frame_step

    def forward(self, z_BZ: Tensor, labels_B: Tensor | None, low_BTCHW: Tensor) -> Tensor:
        """x_l [B, t, 3, h, w] → [B, t * frame_step, 3, resolution, resolution], fp32."""
        expected = (LOW_CHANNELS, self.low_resolution, self.low_resolution)
        if low_BTCHW.ndim != 5 or low_BTCHW.shape[2:] != expected:
            raise ValueError(f"x_l must be [B, t, {expected}], not {tuple(low_BTCHW.shape)}")
        num_frames = low_BTCHW.shape[1] * self.frame_step
        low = low_BTCHW.to(self.compute_dtype)
        return self.synthesize(z_BZ, labels_B, num_frames, low)
