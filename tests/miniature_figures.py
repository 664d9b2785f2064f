"""Figures and a plan of the miniature for its tests."""

import dataclasses
from pathlib import Path
from typing import Any

from benchmarks.miniature.budget import (
    Budget,
)
from benchmarks.miniature.measured import ClipFigures
from benchmarks.miniature.plan import MiniaturePlan, Settings
from benchmarks.miniature.verdicts import (
    Real,
)

PLAIN = ClipFigures(
    num_clips=100,
    motion=1.0,
    ends=[1.0, 1.0],
    judder=1.0,
    persistence=1.8,
    recognised={"colour": 1.0, "motion": 1.0},
    variety=1.0,
    grounding=None,
    grounding_of_others=None,
    moves_within=[1.0, 1.0],
    fading=[0.9, 0.9],
    spectra=[],
    spectral_distances=[0.1, 0.1, 0.1, 0.1],
)
REAL = Real(PLAIN, PLAIN, PLAIN, PLAIN)


def measured(**values: Any) -> ClipFigures:
    return dataclasses.replace(PLAIN, **values)


def tiny_plan(out: Path) -> MiniaturePlan:
    return MiniaturePlan(out, Settings.of(40.0, quick=True), {}, {}, Budget(1, 1))
