"""What single clips say of motion and of detail without any network; means over clips are figures.

- motion, persistence: the figures of `engine/clip_figures.py`, as sums that bootstrap weights can
  add up again.
- PSD: the power spectra of `spectra.py` at some frames, which the paper's Appendix E compares.

Shapes: B clips, T frames, H x W pixels, C = 3 (RGB), K frames looked at, R radii.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine import clip_figures
from engine.evaluation.spectra import Radius, spectra

MOTION, STEPS, SPECTRA = "motion", "steps", "spectra"
"""Names of the layers that `frame_features` gives."""


def psd_places(num_frames: int, wanted: Sequence[int]) -> list[int]:
    """Those of the frames `wanted`, numbered from 1, that clips have, numbered from 0."""
    return sorted({number - 1 for number in wanted if number <= num_frames})


def frame_features(
    clips_BTHWC: Tensor, psd_frames: Sequence[int], psd_radius: Radius = "rounded"
) -> dict[str, Tensor]:
    """Layers of uint8 clips, float32, a row per clip.

    `motion` [B, 1] is `clip_figures.motion`, of T >= 2 frames; `steps` [B, 2] the mean step over
    one and over two frames, of T >= 3; `spectra` [B, K * R], of square frames. A layer that clips
    cannot have is left out.
    """
    clips = clips_BTHWC.cpu().permute(0, 1, 4, 2, 3).float().mul(2 / 255).sub(1)
    num_frames, height, width = clips.shape[1], *clips.shape[3:]
    layers = {}
    if num_frames >= 2:
        moved = [clip_figures.motion(clip[None]) for clip in clips]
        layers[MOTION] = torch.tensor(moved)[:, None]
    if num_frames >= 3:
        one = clips.diff(dim=1).abs().mean(dim=(1, 2, 3, 4))
        two = (clips[:, 2:] - clips[:, :-2]).abs().mean(dim=(1, 2, 3, 4))
        layers[STEPS] = torch.stack([one, two], dim=1)
    places = psd_places(num_frames, psd_frames)
    if height == width and places:
        found = [spectra(clip[None], places, psd_radius).flatten() for clip in clips]
        layers[SPECTRA] = torch.stack(found).float()
    return layers
