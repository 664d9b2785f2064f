"""What blocks of a generator hand on: a video, and what is known of it."""

from typing import NamedTuple

import torch
from torch import Tensor

import kernels


class Features(NamedTuple):
    """What a block or a convolution of a generator hands on."""

    video: Tensor
    """[B, T, C, H, W]."""
    moments: kernels.Moments | None = None
    """Of the video, where whoever made it knows them: a norm need not take them again."""
    frames_BT: Tensor | None = None
    """Which of its clip's frames each sample's are; None: all of them."""

    def only(self, frames_BW: Tensor) -> "Features":
        """These frames of each sample's whole clip."""
        samples_B1 = torch.arange(len(frames_BW), device=frames_BW.device)[:, None]
        # Channels last, as the blocks have it: indexing lays out its result anew.
        video = self.video.permute(0, 1, 3, 4, 2)[samples_B1, frames_BW].permute(0, 1, 4, 2, 3)
        return Features(video, None, frames_BW)


class NormalizedFeatures(NamedTuple):
    """What a norm hands to a convolution: relu(norm(x)), not computed yet.

    The convolution computes it, and again in the backward pass, so that nobody keeps it.
    """

    normalized: kernels.Normalized
    frames_BT: Tensor | None
    """As in `Features`."""

    @property
    def dtype(self) -> torch.dtype:
        """The video's."""
        return self.normalized.video.dtype

    def value(self) -> Tensor:
        """The normalised video."""
        return self.normalized.value()
