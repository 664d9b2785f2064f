"""The part of table.md that compares metrics: their values, the ranks, and whether they agree."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.markdown import table
from benchmarks.miniature.evaluating import NO_WEIGHTS
from benchmarks.miniature.measured import FROZEN, OTHER_HALF, SHUFFLED, ClipFigures, EvaluatedModel
from benchmarks.miniature.models import MODELS
from benchmarks.miniature.ranking import (
    CONTROLS,
    FIGURES,
    Answer,
    BySeed,
    RankingFigure,
    agreement,
    answer,
    between_seeds,
    costs,
    prefer_a_still_clip,
    ranks,
)
from engine.evaluation.evaluation import figure as shown

CONTROL_TITLES = {
    OTHER_HALF: "real, others",
    SHUFFLED: "real, frames shuffled",
    FROZEN: "real, first frame frozen",
}


def ranking_section(results: BySeed | None, controls: Mapping[str, ClipFigures]) -> list[str]:
    """Its paragraphs. `results` are None where there was no network."""
    heading = "## What the field's metrics say"
    if results is None:
        return [heading, f"Not measured: {NO_WEIGHTS}."]
    evaluated = _any_evaluation(results)
    return [
        heading,
        _introduction(evaluated),
        table(_values(results, evaluated, controls)),
        "In brackets: the rank by the mean over seeds. FVD and KVD: lower is better; motion: 1 is "
        "as real, others: higher. known by: of all measured clips.",
        f"{_blind(evaluated)} {_still(results, evaluated, controls)}",
        "Kendall's tau between the orders of the models; on the diagonal between a figure's own "
        "with one seed and another:",
        table(_agreements(results)),
        f"{_sentence(answer(results))} `benchmarks/miniature/ranking.py` has the rule.",
    ]


def ranking_tree(
    results: BySeed | None, controls: Mapping[str, ClipFigures]
) -> dict[str, Any] | None:
    """The same for figures.json."""
    if results is None:
        return None
    evaluated = _any_evaluation(results)
    return {
        "protocol": evaluated.protocol,
        "controls": evaluated.controls,
        "controls_recognised": {name: controls[name].recognised for name in CONTROLS},
        "blind_to": evaluated.blind_to,
        "prefer_a_still_clip": prefer_a_still_clip(results, evaluated, controls),
        "seeds": {
            str(seed): {
                name: {"values": found.evaluated.values, "intervals": found.evaluated.intervals}
                for name, found in models.items()
            }
            for seed, models in results.items()
        },
        "ranks": {figure.title: ranks(costs(figure, results)) for figure in FIGURES},
        "between_seeds": {figure.title: between_seeds(figure, results) for figure in FIGURES},
        "answer": asdict(answer(results)),
    }


def _any_evaluation(results: BySeed) -> EvaluatedModel:
    """One that has the controls: they are the same for all, since the real clips are."""
    return next(iter(next(iter(results.values())).values())).evaluated


def _introduction(evaluated: EvaluatedModel) -> str:
    protocol = evaluated.protocol
    return (
        f"`engine/evaluation`, {protocol['num_videos']} of the clips of each model against as many "
        f"real ones, {protocol['num_frames']} frames, protocol {protocol['name']}, network "
        f"{protocol['network']}. FVD and KVD of so few clips compare with nothing outside this "
        "table."
    )


def _values(
    results: BySeed, evaluated: EvaluatedModel, controls: Mapping[str, ClipFigures]
) -> Iterator[Sequence[str]]:
    yield ("model", *(figure.title for figure in FIGURES))
    by_figure = [ranks(costs(figure, results)) for figure in FIGURES]

    def cell(figure: RankingFigure, name: str, rank: int) -> str:
        values = (figure.value(models[name]) for models in results.values())
        return f"{' / '.join(map(shown, values))} ({rank})"

    for model in MODELS:
        yield (
            model.title,
            *(
                cell(figure, model.name, by_model[model.name])
                for figure, by_model in zip(FIGURES, by_figure, strict=True)
            ),
        )
    for control in CONTROLS:
        values = (figure.of_control(evaluated, controls, control) for figure in FIGURES)
        yield (CONTROL_TITLES[control], *map(shown, values))


def _agreements(results: BySeed) -> Iterator[Sequence[str]]:
    yield ("", *(figure.title for figure in FIGURES))
    for place, figure in enumerate(FIGURES):
        own = between_seeds(figure, results)
        others = [agreement(figure, other, results).tau for other in FIGURES[:place]]
        cells = [_tau(tau) for tau in (*others, own)]
        yield (figure.title, *cells, *[""] * (len(FIGURES) - len(cells)))


def _tau(tau: float | None) -> str:
    return "-" if tau is None else f"{tau:.2f}".replace("-0.00", "0.00")


def _blind(evaluated: EvaluatedModel) -> str:
    blind = [
        f"{name} to {' and '.join(damage)}" for name, damage in evaluated.blind_to.items() if damage
    ]
    listed = "; ".join(blind) or "none"
    return f"Blind here, beyond the bootstrap's interval: {listed}."


def _still(results: BySeed, evaluated: EvaluatedModel, controls: Mapping[str, ClipFigures]) -> str:
    titles = ", ".join(prefer_a_still_clip(results, evaluated, controls)) or "none of them"
    return f"By {titles} real clips that stand still are better than every model."


def _sentence(found: Answer) -> str:
    pairs = "; ".join(
        f"{each.first} and {each.second} are {each.relation} (tau {_tau(each.tau)}, "
        f"{each.chance:.2f} by chance)"
        for each in found.agreements
    )
    verdict = "yes" if found.is_alike else "no"
    return (
        f"**Do FVD, KVD and recognition rank the models alike? {verdict.capitalize()}:** {pairs}."
    )
