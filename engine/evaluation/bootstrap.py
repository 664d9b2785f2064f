"""Bootstrap intervals: how far a metric would move with other clips of the same sources.

Clips of both sets are drawn with replacement, `num_resamples` times, by a seed; a draw is a vector
of weights, so that features and products of features are computed once.

FVD and its like are biased: fewer different clips give larger values, and a resample has fewer
different clips (63 % of them). Resamples therefore lie above the value itself, by about the bias
that the value already has against endless data. The interval is the percentiles of the resamples,
moved by the difference of the value and their mean: it is the spread of the metric *at this number
of clips*. What it was moved by is told as `bias`. It says nothing of how far the value is from that
of endless data: compare only values of as many clips.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Resampled = Callable[[Array, Array], float]
"""A metric of two sets as a function of the weights of their clips, [N] and [M]."""


class BootstrapInterval(NamedTuple):
    """A percentile interval, centred as the module's docstring says."""

    low: float
    high: float
    confidence: float
    num_resamples: int
    bias: float
    """Mean of the resamples minus the value."""


def resamples(
    metric: Resampled, num_clips: tuple[int, int], *, num_resamples: int, seed: int
) -> Array:
    """The metric of every resample, [num_resamples]; `num_clips` are N and M.

    The same numbers and seed draw the same clips, so that two metrics' resamples are paired: the
    difference of what they say of one set of clips, or of that set spoilt, has no other clips in
    it. Raises ValueError for fewer than 2 resamples.
    """
    if num_resamples < 2:
        raise ValueError("an interval needs two resamples or more")
    random = np.random.default_rng(seed)
    return np.array([metric(*_draw(num_clips, random)) for _ in range(num_resamples)])


def centred_interval(
    found: Array, value: float, *, confidence: float = 0.95, least: float = -np.inf
) -> BootstrapInterval:
    """The interval that resamples give around `value`, which is within; not below `least`."""
    bias = float(found.mean()) - value
    tail = (1 - confidence) / 2
    low, high = (np.quantile(found, [tail, 1 - tail]) - bias).tolist()
    return BootstrapInterval(
        min(max(low, least), value), max(high, value), confidence, len(found), bias
    )


def _draw(num_clips: tuple[int, int], random: np.random.Generator) -> tuple[Array, Array]:
    """Weights of one resample of each set; never of one clip alone, which has no covariance."""
    weights = []
    for num in num_clips:
        while True:
            drawn = np.bincount(random.integers(num, size=num), minlength=num).astype(np.float64)
            if num == 1 or np.count_nonzero(drawn) > 1:
                break
        weights.append(drawn)
    return weights[0], weights[1]
