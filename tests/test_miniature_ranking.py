"""Which metrics rank the miniature's models alike: orders, the rule, and evaluating them."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from miniature_figures import PLAIN, measured, tiny_plan
from plain_network import PlainNetwork

from benchmarks.miniature import evaluating
from benchmarks.miniature.measured import FROZEN, OTHER_HALF, SHUFFLED, EvaluatedModel
from benchmarks.miniature.measuring import Clips
from benchmarks.miniature.models import (
    MODELS,
    folder_of,
)
from benchmarks.miniature.ranking import (
    ASKED,
    ModelResult,
    answer,
    between_seeds,
    chance,
    costs,
    kendall,
    ranks,
    relation,
)
from benchmarks.miniature.ranking import FIGURES as RANKING_FIGURES
from benchmarks.miniature.ranking_report import ranking_section
from engine.evaluation.real_clips import LabelledClips


def test_kendalls_tau_is_scipys() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        first, second = random.integers(4, size=(2, 6)).tolist()  # with ties
        expected = scipy.stats.kendalltau(first, second).statistic
        assert kendall(first, second) == pytest.approx(expected)
    assert kendall([1, 2, 3], [5, 5, 5]) == 0


def test_orders_are_alike_if_chance_seldom_makes_them_so() -> None:
    """Of six models: one or two neighbours that change places leave 13 or 11 of 15 pairs."""
    first = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert chance(first, first) == pytest.approx(1 / 720)
    two_swaps = [2.0, 1.0, 4.0, 3.0, 5.0, 6.0]
    assert kendall(first, two_swaps) == pytest.approx(11 / 15)
    assert relation(first, two_swaps) == "alike"
    assert relation(first, [-cost for cost in two_swaps]) == "opposite"
    three_swaps = [2.0, 1.0, 4.0, 3.0, 6.0, 5.0]
    assert relation(first, three_swaps) == "unrelated"
    assert relation(first, [1.0] * 6) == "unrelated"
    # Only the order counts.
    assert relation(first, [10.0**cost for cost in first]) == "alike"


def found(fvd: float, kvd: float, by_motion: float, motion: float = 1.0) -> ModelResult:
    values = {"fvd": fvd, "kvd": kvd, "motion": motion}
    values |= dict.fromkeys(("is-k400", "precision", "recall", "coverage"), 0.5)
    controls = {
        name: {OTHER_HALF: 0.5, SHUFFLED: 0.5, FROZEN: 50.0 if name == "fvd" else 0.5}
        for name in values
    }
    protocol = {"num_videos": 64, "num_frames": 16, "name": "a protocol", "network": "a network"}
    blind = {"fvd": ["shuffled frames"], "kvd": []}
    recognised = {"motion": by_motion, "colour": 1.0}
    evaluated = EvaluatedModel(protocol, values, {}, controls, blind)
    return ModelResult(measured(recognised=recognised), evaluated)


def of_models(*models: ModelResult) -> dict[str, ModelResult]:
    return {model.name: each for model, each in zip(MODELS, models, strict=True)}


AGREEING = of_models(*(found(100 * n, n - 3, 0.9 - n / 10) for n in range(1, 7)))
FVD_APART = of_models(
    *(found(100 * other, n - 3, 0.9 - n / 10) for n, other in enumerate([4, 6, 2, 5, 1, 3], 1))
)


def test_metrics_that_rank_alike_are_said_to() -> None:
    agreeing = answer({0: AGREEING, 1: AGREEING})
    assert agreeing.is_alike
    assert [each.tau for each in agreeing.agreements] == pytest.approx([1, 1, 1])
    apart = answer({0: FVD_APART})
    assert not apart.is_alike
    pairs = {(each.first, each.second): each.relation for each in apart.agreements}
    assert pairs == {
        ("FVD", "KVD"): "unrelated",
        ("FVD", "known by motion"): "unrelated",
        ("KVD", "known by motion"): "alike",
    }


def test_models_are_ranked_by_the_mean_over_seeds() -> None:
    """Motion of 0.5 and of 1.5 is as far from real with either seed: the mean is not 1."""
    uneven, even = found(1, 1, 0.5, motion=0.5), found(1, 1, 0.5, motion=0.8)
    other = found(1, 1, 0.5, motion=1.5)
    (motion,) = (figure for figure in RANKING_FIGURES if figure.title == "motion")
    both = {0: {"a": uneven, "b": even}, 1: {"a": other, "b": even}}
    assert costs(motion, both) == pytest.approx({"a": 0.5, "b": 0.2})
    assert ranks(costs(motion, both)) == {"a": 2, "b": 1}
    assert ranks({"a": 1.0, "b": 0.0, "c": 1.0}) == {"a": 2, "b": 1, "c": 2}


def test_a_figure_is_compared_with_itself_between_seeds() -> None:
    fvd, kvd, _ = ASKED
    both = {0: AGREEING, 1: FVD_APART}
    assert between_seeds(kvd, both) == 1
    assert between_seeds(fvd, both) == pytest.approx(
        kendall([1, 2, 3, 4, 5, 6], [4, 6, 2, 5, 1, 3])
    )
    assert between_seeds(fvd, {0: AGREEING}) is None


def test_the_section_says_what_was_found() -> None:
    spoilt = measured(recognised={"motion": 0.1, "colour": 1.0})
    controls = {OTHER_HALF: PLAIN, SHUFFLED: spoilt, FROZEN: spoilt}
    text = "\n".join(ranking_section({0: AGREEING, 1: FVD_APART}, controls))
    row = next(line for line in text.splitlines() if line.startswith("| SSW-GAN"))
    assert "| 100.0 / 400.0 (" in row
    assert "| 0.800 / 0.800 (1) |" in row
    frozen = next(line for line in text.splitlines() if line.startswith("| real, first frame"))
    assert frozen.split(" | ")[1] == "50.00"
    assert frozen.split(" | ")[8] == "0.100"
    assert "Blind here, beyond the bootstrap's interval: fvd to shuffled frames." in text
    assert "By FVD real clips that stand still are better than every model." in text
    assert "rank the models alike? No:** FVD and KVD are" in text
    assert "alike? Yes:**" in "\n".join(ranking_section({0: AGREEING}, controls))
    assert "Not measured: no I3D weights" in "\n".join(ranking_section(None, controls))


class NoisyClips:
    """In place of RealClips: noise, 16 frames each."""

    classes = (0, 1, 2, 3)

    def halves(self) -> tuple[LabelledClips, LabelledClips]:
        return noise(4, seed=0), noise(4, seed=1)


def noise(num: int, seed: int) -> LabelledClips:
    random = torch.Generator().manual_seed(seed)
    return LabelledClips(torch.rand(2 * num, 16, 3, 8, 8, generator=random) * 2 - 1, None)


def test_models_are_evaluated_once_if_there_is_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    plan, network = tiny_plan(tmp_path), PlainNetwork(least_frames=9)
    monkeypatch.setattr(plan.settings.__class__, "evaluated_per_class", 2)
    monkeypatch.setattr(evaluating, "weights_path", lambda: tmp_path / "no-such-file")
    monkeypatch.setattr(evaluating.I3DNetwork, "load", lambda path, device: network)
    monkeypatch.setattr(evaluating, "RealClips", lambda plan, names: NoisyClips())
    monkeypatch.setattr(evaluating, "find_checkpoint", lambda folder: SimpleNamespace(classes=[]))

    def make_clips(folder: Path, classes: list[int], per_class: int, passes: int) -> Clips:
        return Clips(noise(len(classes) * per_class // 2, seed=sum(map(ord, str(folder)))), None)

    monkeypatch.setattr(evaluating, "make_clips", make_clips)
    results = {seed: {model.name: PLAIN for model in MODELS} for seed in (0, 1)}
    evaluating.evaluate_models(plan, [0, 1], said.append)
    assert said == [evaluating.NO_WEIGHTS]
    assert evaluating.with_evaluations(plan, results) is None
    (tmp_path / "no-such-file").touch()
    for seed in (0, 1):
        for model in MODELS:
            folder_of(tmp_path, seed, model.name).mkdir(parents=True)
    evaluating.evaluate_models(plan, [0], said.append)
    assert len(said) == 1 + len(MODELS)
    assert evaluating.with_evaluations(plan, results) is None  # not of seed 1
    evaluating.evaluate_models(plan, [0, 1], said.append)
    assert len(said) == 1 + 2 * len(MODELS)
    # 8 real clips, as many others, these spoilt in two ways, and 8 of each model: each once.
    assert sum(shape[0] for shape in network.shown) == 8 * (4 + 2 * len(MODELS))
    ranked = evaluating.with_evaluations(plan, results)
    assert ranked is not None
    evaluated = ranked[1]["full"].evaluated
    assert evaluated.controls["motion"]["real-frozen"] == 0
    assert evaluated.protocol["num_videos"] == 8
    assert all(low <= evaluated.values[m] <= high for m, (low, high) in evaluated.intervals.items())
