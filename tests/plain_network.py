"""A feature network that takes microseconds, for tests of what surrounds the real one."""

import torch
from torch import Tensor

from engine.evaluation.i3d import Placing


class PlainNetwork:
    """Means of frames and of steps between them, mixed at random: it sees colour, and motion."""

    name, sha256 = "plain", "0" * 64

    def __init__(self, least_frames: int = 1, size: int = 12) -> None:
        self.least_frames, self._size = least_frames, size
        self.shown: list[list[int]] = []
        """The shapes of all clips that it was shown."""

    def __call__(self, clips_BTHWC: Tensor, resize: Placing) -> dict[str, Tensor]:
        self.shown.append(list(clips_BTHWC.shape))
        clips = clips_BTHWC.double() / 255
        steps = clips.diff(dim=1).abs().mean(dim=(1, 2, 3, 4))[:, None]
        persistent = (clips[:, 2:] - clips[:, :-2]).abs().mean(dim=(1, 2, 3, 4))[:, None] - steps
        colours = clips.mean(dim=(1, 2, 3))
        seen = torch.cat([colours, 20 * steps, 20 * persistent], dim=1)
        random = torch.Generator().manual_seed(0)
        mixing = torch.randn(5, self._size, generator=random, dtype=torch.float64)
        logits = (seen @ mixing).float()
        return {"logits": logits, "pooled": torch.cat([logits, seen.float()], dim=1)}
