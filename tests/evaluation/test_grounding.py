"""How far f(x) is from x_l: numbers that can be worked out by hand."""

import pytest
import torch

from engine.clip_figures import LEVEL
from engine.evaluation.grounding import grounding
from engine.models.upsampler import interpolate_frames


def clip(num_frames: int, side: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.rand(2, num_frames, 3, side, side, generator=random) * 2 - 1


def test_by_hand() -> None:
    """f keeps frame 0 and the pixels at even places: 1, 3, 9 and 11 of the first row of numbers."""
    video = torch.arange(1.0, 33).view(1, 2, 1, 4, 4) * LEVEL
    low = torch.tensor([[1.0, 3], [9, 11]]).view(1, 1, 1, 2, 2) * LEVEL
    assert grounding(video, low, frame_step=2) == 0
    off = low + torch.tensor([[0.0, -1], [2, 5]]) * LEVEL
    assert grounding(video, off, frame_step=2) == pytest.approx((0 + 1 + 2 + 5) / 4, rel=1e-5)


def test_only_what_f_keeps_counts() -> None:
    low = clip(3, 4)
    repeated = low.repeat_interleave(2, 1).repeat_interleave(2, 3).repeat_interleave(2, 4)
    assert grounding(repeated, low, frame_step=2) == 0
    changed = repeated.clone()
    changed[:, 1::2] = 0.5  # frames between
    changed[..., 1::2] = -0.5  # pixels between
    assert grounding(changed, low, frame_step=2) == 0
    assert grounding(interpolate_frames(low, 2), low, frame_step=2) == 0
    assert grounding(repeated.roll(1, dims=1), low, frame_step=2) > 10


def test_of_unrelated_clips() -> None:
    """The mean distance of two uniform numbers in [-1, 1] is 2/3; here 4,608 pairs (σ 0.47)."""
    found = grounding(clip(12, 8, seed=1), clip(12, 8, seed=2), frame_step=1)
    assert found * LEVEL == pytest.approx(2 / 3, abs=4 * 0.47 / 4608**0.5)


@pytest.mark.parametrize("frames", [4, 7])
def test_lengths_must_fit(frames: int) -> None:
    with pytest.raises(ValueError, match="f\\(x\\) is"):
        grounding(clip(frames, 4), clip(3, 2), frame_step=2)
