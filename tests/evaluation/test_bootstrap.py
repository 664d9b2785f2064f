"""Bootstrap intervals: of a mean, whose standard error is known, and of a biased distance."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.evaluation.bootstrap import BootstrapInterval, Resampled, centred_interval, resamples
from engine.evaluation.distances import Frechet

Array = NDArray[np.float64]


def interval(
    metric: Resampled,
    sizes: tuple[int, int],
    value: float,
    num_resamples: int = 200,
    seed: int = 0,
    confidence: float = 0.95,
    least: float = -math.inf,
) -> BootstrapInterval:
    found = resamples(metric, sizes, num_resamples=num_resamples, seed=seed)
    return centred_interval(found, value, confidence=confidence, least=least)


def test_of_a_mean_it_is_its_standard_error() -> None:
    """1.96 s/√N on either side. A quantile of 4000 resamples is off by 3 % of a deviation."""
    x = np.random.default_rng(0).normal(size=200)
    value = float(x.mean())

    def mean(_: Array, weights: Array) -> float:
        return float(weights @ x / weights.sum())

    found = interval(mean, (5, 200), value, num_resamples=4000, seed=1)
    error = float(x.std()) / math.sqrt(200)
    assert (found.low - value) / error == pytest.approx(-1.96, abs=0.15)
    assert (found.high - value) / error == pytest.approx(1.96, abs=0.15)
    assert abs(found.bias) < 4 * error / math.sqrt(4000)
    assert interval(mean, (5, 200), value, num_resamples=4000, seed=1) == found
    assert interval(mean, (5, 200), value, num_resamples=4000, seed=2) != found
    narrow = interval(mean, (5, 200), value, num_resamples=4000, seed=1, confidence=0.5)
    assert (narrow.high - narrow.low) / error == pytest.approx(2 * 0.6745, abs=0.15)


def test_both_sets_are_drawn() -> None:
    seen: list[tuple[Array, Array]] = []

    def keep(first: Array, second: Array) -> float:
        seen.append((first, second))
        return 0.0

    interval(keep, (7, 3), 0.0, num_resamples=50)
    for first, second in seen:
        assert (first.sum(), second.sum()) == (7, 3)
        assert np.count_nonzero(second) > 1
    assert len({tuple(first) for first, _ in seen}) > 40


def test_a_biased_distance_has_its_value_inside() -> None:
    """Of Fréchet distances all resamples may lie above the value; the interval is moved back."""
    random = np.random.default_rng(0)
    x, y = random.normal(size=(40, 16)), random.normal(size=(40, 16)) + 0.5
    distance = Frechet(x, y, unbiased=True)
    value = distance()
    found = interval(distance, (40, 40), value, seed=0, least=0.0)
    assert found.bias > 0.2 * value
    assert 0 <= found.low < value < found.high
    # What other clips of the same two distributions would have given.
    others = [
        Frechet(random.normal(size=(40, 16)), random.normal(size=(40, 16)) + 0.5, unbiased=True)()
        for _ in range(200)
    ]
    assert found.high - found.low == pytest.approx(4 * np.std(others), rel=0.5)


def test_no_interval_without_resamples() -> None:
    with pytest.raises(ValueError, match="two resamples"):
        interval(lambda a, b: 0.0, (2, 2), 0.0, num_resamples=1)
