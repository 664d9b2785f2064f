"""What is found of a set of clips, and the files that keep it in OUT/seed-S/MODEL.

figures.json has the figures of `engine/clip_figures.py`, evaluation.json what `engine/evaluation`
finds by the I3D network's features.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.miniature.models import NUM_FRAMES, folder_of
from engine.evaluation.spectra import frames_looked_at

FIGURES, EVALUATION, STRIP = "figures.json", "evaluation.json", "strip.png"
REAL, OTHER_HALF = "real", "real-against-real"
SHUFFLED, FROZEN = "real-shuffled", "real-frozen"
"""The other half, spoilt."""
OF_REAL_CLIPS = (REAL, OTHER_HALF, SHUFFLED, FROZEN)
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


@dataclass(frozen=True)
class EvaluatedModel:
    """What an evaluation found of a model's clips and, by the same protocol, of real ones."""

    protocol: dict[str, Any]
    values: dict[str, float]
    """By metric."""
    intervals: dict[str, list[float]]
    """95 % of the bootstrap, from and to, by metric."""
    controls: dict[str, dict[str, float]]
    """By metric and control (OTHER_HALF, SHUFFLED, FROZEN), of as many clips."""
    blind_to: dict[str, list[str]]
    """Damage that the metric does not tell from real clips, by metric."""


def read_evaluated(out: Path, seed: int, name: str) -> EvaluatedModel | None:
    """What an evaluation found of a model; None where there was none yet."""
    path = folder_of(out, seed, name) / EVALUATION
    return EvaluatedModel(**json.loads(path.read_text())) if path.exists() else None
