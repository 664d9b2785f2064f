"""Does each conclusion of the paper hold in the miniature? Stated rules, one figure for each.

A conclusion says that one model is better than another. One figure decides, turned into a cost that
is less where a model is better. For each seed the better model must have the clearly lesser cost;
what counts as clearly is a rule too. Then:

- holds: so it is with every seed;
- does not hold: it is so with no seed, be it that the other is better or that they are alike;
- undecided: the seeds disagree, or a figure says nothing (of fading, where nothing moves).

Two seeds agree by chance every second time. Other figures are shown beside the one that decides;
they change nothing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.miniature.measured import FROZEN, OTHER_HALF, SHUFFLED, ClipFigures
from benchmarks.miniature.models import WINDOWS

Outcome = Literal["for", "alike", "against", "no answer"]
Verdict = Literal["holds", "does not hold", "undecided"]

CLEARLY = 0.1
"""A cost is clearly less where it is this part less."""
STILL = 0.2
"""Of clips that move less than this part of the real ones', fading says nothing."""
LEAST_FADING = math.log(1.1)
"""Motion after a window within a tenth of what it shall be costs this much, however near it is."""
LEAST_MOTION = 1e-3
"""Part of the real motion that clips have at least, so that its logarithm is finite."""
LEAST_GROUNDING = 0.5
"""8-bit levels, which rounding may be off by."""


@dataclass(frozen=True)
class Real:
    """What the figures are of real clips: of those compared with, of others, of those spoilt."""

    itself: ClipFigures
    other_half: ClipFigures
    shuffled: ClipFigures
    frozen: ClipFigures

    def controls(self) -> dict[str, ClipFigures]:
        """By name: what a perfect model would get, and what damage does to it."""
        return {OTHER_HALF: self.other_half, SHUFFLED: self.shuffled, FROZEN: self.frozen}


@dataclass(frozen=True)
class Figure:
    """A figure of a model, shown, and its cost."""

    title: str
    value: Callable[[ClipFigures], float | None]
    cost: Callable[[ClipFigures, Real], float | None]
    """Less is better; None where it says nothing."""
    is_share: bool = False
    """Of clips: clearly less is then more than one standard error of the difference."""


def spectral(measured: ClipFigures) -> float:
    """The mean over frames of the distance from the real clips' PSD."""
    return math.fsum(measured.spectral_distances) / len(measured.spectral_distances)


def _spectral_cost(measured: ClipFigures, real: Real) -> float:
    return max(spectral(measured), spectral(real.other_half))


def _at_the_end(measured: ClipFigures) -> float:
    return measured.spectral_distances[-1]


def _end_cost(measured: ClipFigures, real: Real) -> float:
    return max(_at_the_end(measured), _at_the_end(real.other_half))


def _grounding_cost(measured: ClipFigures, real: Real) -> float | None:
    return None if measured.grounding is None else max(measured.grounding, LEAST_GROUNDING)


def _recognised(kind: str) -> Figure:
    return Figure(
        f"known by {kind}",
        lambda measured: measured.recognised[kind],
        lambda measured, real: 1 - measured.recognised[kind],
        is_share=True,
    )


def _judder_cost(measured: ClipFigures, real: Real) -> float:
    return abs(math.log(measured.judder / real.itself.judder))


def _motion_cost(measured: ClipFigures, real: Real) -> float:
    return abs(math.log(max(measured.motion, LEAST_MOTION)))


def _variety_cost(measured: ClipFigures, real: Real) -> float | None:
    return None if measured.variety is None else abs(1 - measured.variety)


def _fading(window: int) -> Figure:
    """How far motion after a window is from what it is in real clips, in either direction."""
    place = WINDOWS.index(window)

    def cost(measured: ClipFigures, real: Real) -> float | None:
        if measured.moves_within[place] < STILL:
            return None
        distance = abs(math.log(measured.fading[place] / real.itself.fading[place]))
        return max(distance, LEAST_FADING)

    return Figure(f"motion after {window} frames", lambda m: m.fading[place], cost)


SPECTRAL = Figure("PSD difference", spectral, _spectral_cost)
AT_THE_END = Figure("PSD difference at the end", _at_the_end, _end_cost)
GROUNDING = Figure("grounding", lambda m: m.grounding, _grounding_cost)
JUDDER = Figure("judder", lambda m: m.judder, _judder_cost)
MOTION = Figure("motion", lambda m: m.motion, _motion_cost)
VARIETY = Figure("variety", lambda m: m.variety, _variety_cost)
BY_MOTION, BY_COLOUR = _recognised("motion"), _recognised("colour")
AFTER_6, AFTER_12 = (_fading(window) for window in WINDOWS)


@dataclass(frozen=True)
class Conclusion:
    """What the paper concludes, of two models of models.py, and by which figure we judge it."""

    place: str
    claim: str
    better: str
    worse: str
    decides: Figure
    reason: str
    """Why this figure."""
    beside: tuple[Figure, ...]


CONCLUSIONS = (
    Conclusion(
        "Table 1",
        "longer windows train a better stage 2",
        *("full", "window3"),
        SPECTRAL,
        "the paper's FVD and IS need more clips than a miniature has; this is its own measure of "
        "frames all along a clip (Appendix E)",
        (JUDDER, GROUNDING, BY_MOTION),
    ),
    Conclusion(
        "Table 2",
        "the matching discriminator grounds stage 2 in what it upsamples",
        *("full", "no_matching"),
        GROUNDING,
        "it is what the matching discriminator judges",
        (SPECTRAL, JUDDER, BY_MOTION),
    ),
    Conclusion(
        "Appendix C",
        "separable convolutions go on beyond the window where a ConvGRU fades",
        *("full", "conv_gru"),
        AFTER_12,
        "both were trained on 12 frames",
        (AT_THE_END, SPECTRAL, JUDDER, GROUNDING),
    ),
    Conclusion(
        "Appendix H",
        "stages trained one after the other beat joint training of the same cost",
        *("full", "joint"),
        BY_MOTION,
        "whether a clip moves as its class does hangs on stage 1, which joint training leaves "
        "without discriminators of its own",
        (BY_COLOUR, SPECTRAL, MOTION, VARIETY),
    ),
    Conclusion(
        "Figure 3",
        "DVD-GAN, trained on 6 frames, fades when unrolled; two stages of the same cost do not",
        *("full", "dvdgan"),
        AFTER_6,
        "DVD-GAN was trained on 6 frames",
        (AT_THE_END, SPECTRAL, BY_MOTION, VARIETY),
    ),
)


@dataclass(frozen=True)
class Compared:
    """A figure of two models with one seed."""

    better: float | None
    worse: float | None
    outcome: Outcome


def compare(figure: Figure, better: ClipFigures, worse: ClipFigures, real: Real) -> Compared:
    """Which of two models the figure takes for the better one."""
    costs = figure.cost(better, real), figure.cost(worse, real)
    outcome: Outcome = "no answer"
    if costs[0] is not None and costs[1] is not None:
        margins = _margins(figure, costs[0], costs[1], better.num_clips)
        outcome = _outcome(costs[0], costs[1], *margins)
    return Compared(figure.value(better), figure.value(worse), outcome)


def _margins(figure: Figure, cost: float, other: float, num_clips: int) -> tuple[float, float]:
    """By how much the first, and the second, must be less."""
    if not figure.is_share:
        return CLEARLY * other, CLEARLY * cost
    error = math.sqrt((cost * (1 - cost) + other * (1 - other)) / num_clips)
    return error, error


def _outcome(cost: float, other: float, margin: float, other_margin: float) -> Outcome:
    if cost < other - margin:
        return "for"
    return "against" if other < cost - other_margin else "alike"


def verdict(outcomes: Sequence[Outcome]) -> Verdict:
    """Of the outcomes of all seeds. ValueError without any."""
    if not outcomes:
        raise ValueError("no seeds, no verdict")
    if all(outcome == "for" for outcome in outcomes):
        return "holds"
    if all(outcome in ("against", "alike") for outcome in outcomes):
        return "does not hold"
    return "undecided"


@dataclass(frozen=True)
class Judgement:
    """A conclusion, what was found for each seed, and the verdict."""

    conclusion: Conclusion
    decided: dict[int, Compared]
    """By seed."""
    beside: dict[str, dict[int, Compared]]
    """By figure and seed."""
    verdict: Verdict


Results = Mapping[int, Mapping[str, ClipFigures]]
"""By seed and model."""


def judge(conclusion: Conclusion, results: Results, reals: Mapping[int, Real]) -> Judgement:
    """Judge a conclusion by the results of all seeds."""

    def compared(figure: Figure) -> dict[int, Compared]:
        return {
            seed: compare(figure, models[conclusion.better], models[conclusion.worse], reals[seed])
            for seed, models in results.items()
        }

    decided = compared(conclusion.decides)
    return Judgement(
        conclusion,
        decided,
        {figure.title: compared(figure) for figure in conclusion.beside},
        verdict([found.outcome for found in decided.values()]),
    )
