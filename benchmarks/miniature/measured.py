"""What is found of a set of clips, and the file that keeps it: OUT/seed-S/MODEL/figures.json."""

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.miniature.models import NUM_FRAMES, folder_of
from engine.evaluation.spectra import frames_looked_at

FIGURES, STRIP = "figures.json", "strip.png"
REAL, OTHER_HALF = "real", "real-against-real"
FRAMES = frames_looked_at(NUM_FRAMES)
"""Whose spectra are compared; from 0."""


@dataclass(frozen=True)
class ClipFigures:
    """What was found of one set of clips; engine/evaluation defines all of it."""

    num_clips: int
    motion: float
    """Part of the real clips'."""
    ends: list[float] | None
    judder: float
    persistence: float
    recognised: dict[str, float]
    """Share by the classifier's name."""
    variety: float | None
    """Part of the real clips'."""
    grounding: float | None
    """8-bit levels; None without a stage before."""
    grounding_of_others: float | None
    """The same of each clip and another one's x_l, of the same class."""
    moves_within: list[float]
    """Motion in the first 6 and 12 frames (WINDOWS), as part of the real clips' there."""
    fading: list[float]
    """Motion after the first 6 and 12 frames, as part of that in them."""
    spectra: list[list[float]]
    """PSD of luminance, by frame of FRAMES and radius."""
    spectral_distances: list[float]
    """From the real clips', by frame of FRAMES."""


def read_measured(out: Path, seed: int, name: str) -> ClipFigures | None:
    """What was measured of a model, or of real clips; None where it is not yet."""
    path = folder_of(out, seed, name) / FIGURES
    return ClipFigures(**json.loads(path.read_text())) if path.exists() else None
