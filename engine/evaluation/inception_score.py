"""The inception score of a set of clips, from a classifier's logits.

Salimans et al. (arXiv 1606.03498): exp of the mean KL divergence of p(y|x) from p(y), high where
single clips are classified surely and all of them variously. It sees no real clips at all. For
videos the classifier is I3D; the paper's was trained on Kinetics-600, ours on Kinetics-400.

Shapes: N clips, K classes.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


class SplitScore(NamedTuple):
    """Mean and standard deviation over splits (divided by their number, as the field does)."""

    mean: float
    deviation: float


class InceptionScore:
    """The score of a set of clips, for any weights of them.

    The set is cut into `num_splits` parts in the order given: shuffle clips that come class by
    class first. A part's score is at most its number of clips, so scores of few clips or many
    splits are low whatever they show.
    """

    def __init__(self, logits_NK: ArrayLike, num_splits: int = 10) -> None:
        logits = np.asarray(logits_NK, dtype=np.float64)
        if logits.ndim != 2 or not np.isfinite(logits).all():
            raise ValueError("logits must be [N, K] and finite")
        if not 1 <= num_splits <= len(logits):
            raise ValueError(f"{len(logits)} clips cannot be cut into {num_splits} splits")
        logs = logits - logits.max(axis=1, keepdims=True)
        logs -= np.log(np.exp(logs).sum(axis=1, keepdims=True))
        self._probabilities_NK = np.exp(logs)
        self._negentropies_N = (self._probabilities_NK * logs).sum(axis=1)
        bounds = [len(logits) * number // num_splits for number in range(num_splits + 1)]
        self._parts = [slice(*pair) for pair in pairwise(bounds)]

    def __call__(self, weights_N: Array | None = None) -> SplitScore:
        """The score; a weight is how often a clip was drawn. Parts that none was drawn of are
        left out.
        """
        weights = np.ones(len(self._negentropies_N)) if weights_N is None else weights_N
        scores = [self._score(part, weights[part]) for part in self._parts if weights[part].any()]
        return SplitScore(float(np.mean(scores)), float(np.std(scores)))

    def _score(self, part: slice, weights: Array) -> float:
        share = weights / weights.sum()
        marginal_K = share @ self._probabilities_NK[part]
        seen_K = marginal_K[marginal_K > 0]
        return float(np.exp(share @ self._negentropies_N[part] - seen_K @ np.log(seen_K)))
