"""What the miniature writes in the end: table.md for people, figures.json for programs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.markdown import table
from benchmarks.miniature.budget import STAGE_1, SUSTAINED_GFLOPS
from benchmarks.miniature.measured import FRAMES, ClipFigures
from benchmarks.miniature.models import MODELS, NUM_FRAMES, PAPERS_LOW_FRAMES, WINDOWS, own_options
from benchmarks.miniature.plan import MiniaturePlan
from benchmarks.miniature.ranking import BySeed
from benchmarks.miniature.ranking_report import CONTROL_TITLES, ranking_section, ranking_tree
from benchmarks.miniature.verdicts import Compared, Judgement, Real, Results

_NONE = "-"
_MARKS = {"for": "", "alike": " (alike)", "against": " (against)", "no answer": " (no answer)"}
_TITLES = {STAGE_1: "stage 1, shared", **{model.name: model.title for model in MODELS}}


def report(
    plan: MiniaturePlan,
    results: Results,
    reals: Mapping[int, Real],
    judgements: Sequence[Judgement],
    ranked: BySeed | None,
) -> str:
    """The whole of table.md."""
    parts = [
        "# The paper in miniature",
        _introduction(plan, list(results)),
        "## Figures",
        table(_figures(results, reals)),
        _legend(),
        "## Verdicts",
        table(_verdicts(judgements)),
        _rules(),
        *ranking_section(ranked, _any(reals).controls()),
        "## Cost",
        table(_costs(plan)),
        _deviations(plan),
    ]
    return "\n\n".join(parts) + "\n"


def tree(
    plan: MiniaturePlan,
    results: Results,
    reals: Mapping[int, Real],
    judgements: Sequence[Judgement],
    ranked: BySeed | None,
) -> dict[str, Any]:
    """The whole of figures.json."""
    return {
        "settings": asdict(plan.settings),
        "flops_per_iteration": plan.flops,
        "iterations": plan.iterations,
        "budget": asdict(plan.budget),
        "spectra_of_frames": FRAMES,
        "own_options": {m.name: own_options(plan.config(m, 0)) for m in MODELS},
        "seeds": {
            str(seed): {
                "real": asdict(reals[seed].itself),
                "real_against_real": asdict(reals[seed].other_half),
                "real_shuffled": asdict(reals[seed].shuffled),
                "real_frozen": asdict(reals[seed].frozen),
                "models": {name: asdict(measured) for name, measured in models.items()},
            }
            for seed, models in results.items()
        },
        "verdicts": [
            {
                "place": found.conclusion.place,
                "claim": found.conclusion.claim,
                "better": found.conclusion.better,
                "worse": found.conclusion.worse,
                "decided_by": found.conclusion.decides.title,
                "verdict": found.verdict,
                "by_seed": {str(seed): asdict(one) for seed, one in found.decided.items()},
                "beside": {
                    title: {str(seed): asdict(one) for seed, one in by_seed.items()}
                    for title, by_seed in found.beside.items()
                },
            }
            for found in judgements
        ],
        "evaluation": ranking_tree(ranked, _any(reals).controls()),
    }


def cost_lines(plan: MiniaturePlan) -> list[str]:
    """The counts and the iterations, for a terminal."""
    lines = []
    for name, flops in plan.flops.items():
        num, total = plan.iterations[name], plan.iterations[name] * flops
        lines.append(
            f"  {_TITLES[name]:32}{flops / 1e9:7.1f} GFLOP x{num:5} iterations ="
            f"{total / 1e12:6.2f} TFLOP"
        )
    return lines


def _introduction(plan: MiniaturePlan, seeds: list[int]) -> str:
    settings = plan.settings
    clips = 8 * settings.clips_per_class
    text = (
        f"The paper's comparisons on the procedural sample set: two stages, 16x16/8 and 32x32, "
        f"unrolled to {NUM_FRAMES} frames; seeds of training {', '.join(map(str, seeds))}. "
        f"Figures are of {clips} clips, made as `engine/sample.py` makes them: sigma 1, norm "
        f"statistics fixed at the unrolled length by {settings.passes} passes, the same z "
        "for every model and seed. Where there are several values, they are of the seeds in turn. "
        "Models of a few hundred iterations on moving shapes say what this code does, not what the "
        "paper's models do."
    )
    if settings.quick:
        text = f"**A quick run: it checks the code, and its figures mean nothing.**\n\n{text}"
    return text


def _figures(results: Results, reals: Mapping[int, Real]) -> Iterator[Sequence[str]]:
    yield (
        *("model", "motion", "at start, end", "judder", "variety"),
        *("known by colour", "known by motion", "grounding (of others)"),
        *(f"motion after {window}" for window in WINDOWS),
        *(f"PSD at frame {frame + 1}" for frame in FRAMES),
    )
    for model in MODELS:
        yield _row(model.title, [models[model.name] for models in results.values()])
    for name, measured in _any(reals).controls().items():
        yield _row(CONTROL_TITLES[name], [measured])
    yield _row("real", [_any(reals).itself])


def _any(reals: Mapping[int, Real]) -> Real:
    """The same clips with every seed."""
    return next(iter(reals.values()))


def _row(title: str, measured: Sequence[ClipFigures]) -> Sequence[str]:
    def cell(values: Sequence[float | None], decimals: int = 2) -> str:
        return " / ".join(_number(value, decimals) for value in values)

    ends = " / ".join(
        _NONE if m.ends is None else ", ".join(map(_number, m.ends)) for m in measured
    )
    grounding = " / ".join(
        _NONE
        if m.grounding is None
        else f"{_number(m.grounding, 1)} ({_number(m.grounding_of_others, 1)})"
        for m in measured
    )
    return (
        title,
        cell([m.motion for m in measured]),
        ends,
        cell([m.judder for m in measured]),
        cell([m.variety for m in measured]),
        cell([m.recognised.get("colour") for m in measured]),
        cell([m.recognised.get("motion") for m in measured]),
        grounding,
        *(cell([m.fading[place] for m in measured]) for place in range(len(WINDOWS))),
        *(cell([m.spectral_distances[place] for m in measured]) for place in range(len(FRAMES))),
    )


def _legend() -> str:
    return (
        "motion, variety: parts of the real clips'. at start, end: parts of the motion in the "
        "middle. judder: 1 is even. known by: share of clips that a classifier of real ones takes "
        "for their class. grounding: mean |f(x) - x_l| in 8-bit levels, in brackets with the x_l "
        "of another clip of the class; where stages train together, x_l is what stage 1 came to. "
        "motion after N: per frame after the first N frames, as part of that in them. PSD: root "
        "mean square difference of log10 PSD from the real clips'. Read all of it beside the last "
        "lines, of real clips. The figures are defined in `engine/clip_figures.py`, "
        "`engine/evaluation/` and `measuring.py`."
    )


def _verdicts(judgements: Sequence[Judgement]) -> Iterator[Sequence[str]]:
    yield (
        "paper",
        "conclusion",
        "decided by",
        "model against other, by seed",
        "verdict",
        "beside it",
    )
    for found in judgements:
        conclusion = found.conclusion
        beside = "; ".join(
            f"{title} {_by_seed(by_seed)}" for title, by_seed in found.beside.items()
        )
        yield (
            conclusion.place,
            conclusion.claim,
            f"{conclusion.decides.title}: {conclusion.reason}",
            _by_seed(found.decided),
            f"**{found.verdict}**",
            beside,
        )


def _by_seed(by_seed: Mapping[int, Compared]) -> str:
    return ", ".join(
        f"{_number(found.better)} : {_number(found.worse)}{_MARKS[found.outcome]}"
        for found in by_seed.values()
    )


def _rules() -> str:
    return (
        "holds: with every seed the figure is clearly better for the model that the paper prefers; "
        "does not hold: with no seed; undecided: the seeds disagree, or the figure says nothing of "
        "one of the models. (alike), (against): what single figures say otherwise. "
        "`benchmarks/miniature/verdicts.py` has the rules. Two seeds agree by chance every second "
        "time."
    )


def _costs(plan: MiniaturePlan) -> Iterator[Sequence[str]]:
    yield "model", "paper", "GFLOP per iteration", "iterations", "TFLOP in all", "budget"
    places = {model.name: model.place for model in MODELS}
    for name, flops in plan.flops.items():
        num = plan.iterations[name]
        yield (
            _TITLES[name],
            places.get(name, "the model"),
            f"{flops / 1e9:.1f}",
            str(num),
            f"{num * flops / 1e12:.2f}",
            f"{plan.budget.of(name) / 1e12:.2f}",
        )


def _deviations(plan: MiniaturePlan) -> str:
    budget = "The budget is a quick run's"
    if not plan.settings.quick:
        budget = (
            f"The budget is what {plan.settings.minutes:g} minutes per seed come to at "
            f"{SUSTAINED_GFLOPS:g} GFLOP/s"
        )
    counted = (
        "FLOPs are counted on the CPU's forms of the operators: all D updates and the G update of "
        f"a batch, and the frozen stage 1's windows. {budget}; a model that trains both stages, or "
        "one of their cost, has both budgets."
    )
    form = "the paper's, its frames repeated" if PAPERS_LOW_FRAMES else "configs/sample.yaml's"
    by_options: dict[str, list[str]] = {}
    for model in MODELS:
        options = "; ".join(own_options(plan.config(model, 0))) or "nothing"
        by_options.setdefault(options, []).append(model.title)
    lines = [f"- {', '.join(titles)}: {options}" for options, titles in by_options.items()]
    listed = f"x_l is {form}. What is on, or set otherwise than in the paper:"
    return "\n".join([counted, "", listed, "", *lines])


def _number(value: float | None, decimals: int = 2) -> str:
    if value is None:
        return _NONE
    text = f"{value:.0f}" if abs(value) >= 100 else f"{value:.{decimals}f}"
    return text.replace("-0.00", "0.00")
