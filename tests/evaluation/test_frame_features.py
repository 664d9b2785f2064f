"""Rows of frame features add up to the figures that they stand for."""

import numpy as np
import pytest
import torch

from engine import clip_figures
from engine.evaluation.frame_features import frame_features, psd_places
from engine.evaluation.spectra import spectra
from engine.video.procedural import render_clip


def test_means_over_clips_are_the_figures() -> None:
    clips = torch.from_numpy(np.stack([render_clip(n, 0, n, 11, 16) for n in range(5)]))
    layers = frame_features(clips, (1, 10, 25))
    video = clips.permute(0, 1, 4, 2, 3).float() / 127.5 - 1
    assert layers["motion"].mean().item() == pytest.approx(clip_figures.motion(video), rel=1e-5)
    one, two = layers["steps"].mean(dim=0).tolist()
    assert two / one == pytest.approx(clip_figures.persistence(video), rel=1e-5)
    expected = spectra(video, [0, 9])
    found = layers["spectra"].double().mean(dim=0).view(2, -1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)


def test_what_clips_cannot_have_is_left_out() -> None:
    def layers(*shape: int) -> set[str]:
        return set(frame_features(torch.zeros(2, *shape, 3, dtype=torch.uint8), (1, 10)))

    assert layers(1, 8, 8) == {"spectra"}
    assert layers(2, 8, 8) == {"motion", "spectra"}
    assert layers(3, 8, 6) == {"motion", "steps"}
    assert set(frame_features(torch.zeros(2, 3, 8, 8, 3, dtype=torch.uint8), (4,))) == {
        "motion",
        "steps",
    }


def test_psd_places_are_counted_from_1() -> None:
    assert psd_places(50, (1, 10, 25, 50)) == [0, 9, 24, 49]
    assert psd_places(49, (1, 10, 25, 50)) == [0, 9, 24]
    assert psd_places(9, (10,)) == []
