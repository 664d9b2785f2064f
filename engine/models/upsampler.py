"""The upsampling generator: stage 2 and later of SSW-GAN."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from engine.models.blocks import Temporal
from engine.models.generator import GeneratorTrunk
from engine.models.layers import LOW_CHANNELS

LowFrames = Literal["repeat", "interpolate"]


class UpsamplingGenerator(GeneratorTrunk):
    """Upsamples x_l, the previous stage's video, in space and time, guided by noise and label.

    Trained on short windows and convolutional in time, so that it runs over clips of any length.
    Output frames come `frame_step` to each input frame; see `GeneratorTrunk` for the rest.

    `low_frames` says how x_l's frames become as many as the output's before they are injected:
    repeated (paper), or interpolated linearly between neighbours (ours). Repeated frames stand
    still and then jump, and a generator that trains for little learns to do the same.

    `edge_frames` says by how many frames x_l is continued at both ends when a whole video is
    unrolled (ours; the paper pads with zeros inside the network).
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
        low_frames: LowFrames = "repeat",
        edge_frames: int = 0,
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
        self.low_frames, self.edge_frames = low_frames, edge_frames

    def forward(
        self,
        z_BZ: Tensor,
        labels_B: Tensor | None,
        low_BTCHW: Tensor,
        *,
        look_ahead: int = 0,
    ) -> Tensor:
        """x_l [B, t, 3, h, w] → [B, t * frame_step, 3, resolution, resolution], fp32.

        The last `look_ahead` frames of x_l become none: the frame before is interpolated with them.
        """
        expected = (LOW_CHANNELS, self.low_resolution, self.low_resolution)
        if low_BTCHW.ndim != 5 or low_BTCHW.shape[2:] != expected:
            raise ValueError(f"x_l must be [B, t, {expected}], not {tuple(low_BTCHW.shape)}")
        num_frames = (low_BTCHW.shape[1] - look_ahead) * self.frame_step
        if self.low_frames == "interpolate":
            low_BTCHW = interpolate_frames(low_BTCHW, self.frame_step)[:, :num_frames]
        low = low_BTCHW.to(self.compute_dtype)
        return self.synthesize(z_BZ, labels_B, num_frames, low)

    def unroll(self, z_BZ: Tensor, labels_B: Tensor | None, low_BTCHW: Tensor) -> Tensor:
        """As `forward`, for a whole video: its first and last frame stand for what is beyond them.

        x_l is continued by `edge_frames` repetitions at both ends, and what they become is cut
        off. So the zeros that convolutions pad a video with lie that much farther from its ends.
        """
        low_BTCHW = repeat_ends(low_BTCHW, self.edge_frames)
        video_BTCHW: Tensor = self(z_BZ, labels_B, low_BTCHW)
        beyond = self.edge_frames * self.frame_step
        return video_BTCHW[:, beyond : video_BTCHW.shape[1] - beyond]


def interpolate_frames(video_BtCHW: Tensor, frame_step: int) -> Tensor:
    """`frame_step` frames for each: itself, then steps of equal size on the way to the next one.

    Behind the last frame nothing is known, so that one is repeated. Linear in the video, and
    differentiable. Returns [B, t * frame_step, C, H, W].
    """
    video_BtHWC = video_BtCHW.permute(0, 1, 3, 4, 2)  # as it lies in memory
    next_BtHWC = torch.cat([video_BtHWC[:, 1:], video_BtHWC[:, -1:]], 1)
    steps = [video_BtHWC.lerp(next_BtHWC, step / frame_step) for step in range(frame_step)]
    return torch.stack(steps, 2).flatten(1, 2).permute(0, 1, 4, 2, 3)


def repeat_ends(video_BTCHW: Tensor, num_frames: int) -> Tensor:
    """The video with its first frame `num_frames` times before it, and its last as often after."""
    if not num_frames:
        return video_BTCHW
    video_BTHWC = video_BTCHW.permute(0, 1, 3, 4, 2)  # as it lies in memory
    first, last = (video_BTHWC[:, t].unsqueeze(1) for t in (0, -1))
    sizes = (-1, num_frames, -1, -1, -1)
    continued = torch.cat([first.expand(sizes), video_BTHWC, last.expand(sizes)], 1)
    return continued.permute(0, 1, 4, 2, 3)
