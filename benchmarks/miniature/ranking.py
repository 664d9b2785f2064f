"""Do FVD, KVD and recognition rank the models alike? Orders of models, and a rule for the answer.

A figure orders the models by its cost, less being better, as the mean over seeds. Two orders are
compared by Kendall's tau: pairs of models in the same order less those in the opposite one, over
all pairs; 1 for equal orders, -1 for opposite ones. The rule, for two figures:

- alike: of all orders that the second could have, at most one of twenty agrees with the first as
  well as it does. Of six models without ties that is a tau of 11/15 or more.
- opposite: the first and the reverse of the second are alike.
- unrelated: neither.

The answer is yes where all pairs of the figures in `ASKED` are alike. A figure cannot agree with
others better than with itself: `between_seeds` compares what it says with one seed of training and
with another.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Literal, NamedTuple

import numpy as np

from benchmarks.miniature.measured import FROZEN, OTHER_HALF, SHUFFLED, ClipFigures, EvaluatedModel
from engine.evaluation.metric_definitions import METRICS

Relation = Literal["alike", "unrelated", "opposite"]
CHANCE = 1 / 20
"""Orders that agree by chance count as alike so often."""
CONTROLS = (OTHER_HALF, SHUFFLED, FROZEN)
_ROUNDING = 1e-9


class ModelResult(NamedTuple):
    """All that is known of one model with one seed."""

    measured: ClipFigures
    evaluated: EvaluatedModel


@dataclass(frozen=True)
class RankingFigure:
    """A figure that ranks models: its value of one, its value of a control, and their cost."""

    title: str
    value: Callable[[ModelResult], float]
    of_control: Callable[[EvaluatedModel, Mapping[str, ClipFigures], str], float]
    """Of an evaluation, the controls' figures and a control's name."""
    cost: Callable[[float], float]
    """Less is better."""


def _evaluated(title: str, name: str) -> RankingFigure:
    return RankingFigure(
        title,
        lambda found: found.evaluated.values[name],
        lambda evaluated, controls, control: evaluated.controls[name][control],
        METRICS[name].badness,
    )


def _recognised(kind: str) -> RankingFigure:
    return RankingFigure(
        f"known by {kind}",
        lambda found: found.measured.recognised[kind],
        lambda evaluated, controls, control: controls[control].recognised[kind],
        lambda share: 1 - share,
    )


FVD, KVD = _evaluated("FVD", "fvd"), _evaluated("KVD", "kvd")
BY_MOTION, BY_COLOUR = _recognised("motion"), _recognised("colour")
FIGURES = (
    FVD,
    KVD,
    _evaluated("IS", "is-k400"),
    _evaluated("precision", "precision"),
    _evaluated("recall", "recall"),
    _evaluated("coverage", "coverage"),
    _evaluated("motion", "motion"),
    BY_MOTION,
    BY_COLOUR,
)
ASKED = (FVD, KVD, BY_MOTION)
"""Recognition by motion stands for recognition: nearly all clips are known by their colour."""

BySeed = Mapping[int, Mapping[str, ModelResult]]
"""By seed and model."""


def costs(figure: RankingFigure, results: BySeed) -> dict[str, float]:
    """By model, the mean over seeds."""
    by_seed = [
        {name: figure.cost(figure.value(found)) for name, found in models.items()}
        for models in results.values()
    ]
    return {name: math.fsum(each[name] for each in by_seed) / len(by_seed) for name in by_seed[0]}


def ranks(by_name: Mapping[str, float]) -> dict[str, int]:
    """By name, from 1 for the least cost; equal ones share the better rank."""
    return {
        name: 1 + sum(other < cost for other in by_name.values()) for name, cost in by_name.items()
    }


def kendall(first: Sequence[float], second: Sequence[float]) -> float:
    """Kendall's tau-b, which leaves out pairs that are tied; 0 where all of them are.

    Kendall, "The treatment of ties in ranking problems", Biometrika 33 (1945).
    """
    one, two = (np.sign(np.subtract.outer(values, values)) for values in (first, second))
    norm = math.sqrt((one**2).sum() * (two**2).sum())
    return float((one * two).sum() / norm) if norm else 0.0


def chance(first: Sequence[float], second: Sequence[float]) -> float:
    """The share of all orders of the second that agree with the first as well as it does."""
    found = kendall(first, second) - _ROUNDING
    taus = [kendall(first, order) for order in permutations(second)]
    return sum(tau >= found for tau in taus) / len(taus)


def relation(first: Sequence[float], second: Sequence[float]) -> Relation:
    """By the module's rule."""
    if chance(first, second) <= CHANCE:
        return "alike"
    return "opposite" if chance(first, [-cost for cost in second]) <= CHANCE else "unrelated"


@dataclass(frozen=True)
class RankAgreement:
    """How two figures order the models."""

    first: str
    second: str
    tau: float
    chance: float
    relation: Relation


def agreement(first: RankingFigure, second: RankingFigure, results: BySeed) -> RankAgreement:
    """Of the means over seeds."""
    both = [list(costs(figure, results).values()) for figure in (first, second)]
    return RankAgreement(first.title, second.title, kendall(*both), chance(*both), relation(*both))


def between_seeds(figure: RankingFigure, results: BySeed) -> float | None:
    """The mean tau of a figure's orders with any two seeds; None with one seed."""
    by_seed = [list(costs(figure, {seed: models}).values()) for seed, models in results.items()]
    taus = [kendall(*pair) for pair in combinations(by_seed, 2)]
    return math.fsum(taus) / len(taus) if taus else None


@dataclass(frozen=True)
class Answer:
    """Whether the figures in ASKED rank the models alike, and how any two of them do."""

    is_alike: bool
    agreements: tuple[RankAgreement, ...]


def answer(results: BySeed) -> Answer:
    """By the module's rule."""
    found = tuple(agreement(*pair, results) for pair in combinations(ASKED, 2))
    return Answer(all(each.relation == "alike" for each in found), found)


def prefer_a_still_clip(
    results: BySeed, evaluated: EvaluatedModel, controls: Mapping[str, ClipFigures]
) -> list[str]:
    """The figures by which real clips that stand still are better than every model."""
    return [
        figure.title
        for figure in FIGURES
        if figure.cost(figure.of_control(evaluated, controls, FROZEN))
        < min(costs(figure, results).values())
    ]
