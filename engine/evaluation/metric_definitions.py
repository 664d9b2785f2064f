"""The metrics of an evaluation: which features each takes, which values are good, how it is found.

Every metric is a function of two sets of features, real ones to compare with (the reference) and
those that are judged (the candidate), and of weights of their clips, which the bootstrap draws.

| name | what | features |
|---|---|---|
| fvd | Fréchet distance | logits |
| fid-k400 | Fréchet distance | pooled; the paper's FID is of an I3D that was not published |
| kvd | squared kernel MMD, unbiased | logits |
| is-k400 | inception score | logits |
| precision, recall | in whose manifold? | pooled |
| density, coverage | the same with real manifolds only | pooled |
| motion | mean step between frames, over real clips' | no network |
| persistence | step over two frames over that over one, over real clips' | no network |
| psd | distance of log10 power spectra of single frames | no network |
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from engine.clip_figures import motion_ratio
from engine.errors import UserError
from engine.evaluation.bootstrap import (
    BootstrapInterval,
    Resampled,
    centred_interval,
    resamples,
)
from engine.evaluation.distances import Frechet, KernelMMD
from engine.evaluation.frame_features import MOTION, SPECTRA, STEPS, psd_places
from engine.evaluation.inception_score import InceptionScore
from engine.evaluation.neighbours import neighbourhoods
from engine.evaluation.protocol import EvaluationProtocol
from engine.evaluation.spectra import spectral_distances

Array = NDArray[np.float64]
Features = Mapping[str, NDArray[np.float32]]
T = TypeVar("T", float, Array)
_LEAST_STEP = 1e-9


@dataclass(frozen=True)
class Measurement:
    """A metric's value of two sets, and how sure it is."""

    value: float
    interval: BootstrapInterval
    num_reference: int
    num_candidates: int
    layer: str
    """Of the features that were taken."""
    details: dict[str, float]
    """What else the field reports of it, such as the deviation over splits."""
    resamples: Array = field(repr=False)
    """Of the bootstrap; paired between measurements of as many clips."""

    def to_tree(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "value": self.value,
            **self.interval._asdict(),
            "num_reference": self.num_reference,
            "num_candidates": self.num_candidates,
            **self.details,
        }


Prepared = tuple[Resampled, float | None, dict[str, float]]
"""The metric for any weights; its value where that is not the one of weights 1; details."""


@dataclass(frozen=True)
class MetricDefinition:
    """One metric."""

    name: str
    layer: str
    best: Literal["low", "high", "one"]
    """Which values real clips have: the lowest, the highest, or those near 1."""
    prepare: Callable[[Array, Array, EvaluationProtocol], Prepared]
    least: float = -np.inf
    """A bound of its values."""
    takes_other_layer: bool = True
    """Whether any features do, where a network has no such layer."""

    @property
    def needs_network(self) -> bool:
        """Whether its features are a network's."""
        return self.layer in ("logits", "pooled")

    def value(
        self, reference: Features, candidate: Features, protocol: EvaluationProtocol
    ) -> float:
        """The value alone, without an interval. Raises ValueError as `measure` does."""
        layer = self._layer(reference)
        first = np.asarray(reference[layer], np.float64)
        second = np.asarray(candidate[layer], np.float64)
        at, value, _ = self.prepare(first, second, protocol)
        return at(np.ones(len(first)), np.ones(len(second))) if value is None else value

    def measure(
        self,
        reference: Features,
        candidate: Features,
        protocol: EvaluationProtocol,
        *,
        num_resamples: int,
    ) -> Measurement:
        """The value and its interval. Raises ValueError with the reason where there is none."""
        layer = self._layer(reference)
        first = np.asarray(reference[layer], np.float64)
        second = np.asarray(candidate[layer], np.float64)
        at, value, details = self.prepare(first, second, protocol)
        if value is None:
            value = at(np.ones(len(first)), np.ones(len(second)))
        sizes = len(first), len(second)
        drawn = resamples(at, sizes, num_resamples=num_resamples, seed=protocol.seed)
        found = centred_interval(drawn, value, least=self.least)
        return Measurement(value, found, *sizes, layer, details, drawn)

    def _layer(self, features: Features) -> str:
        """The layer that is taken: the metric's, or the other one of a network that has only it."""
        other = {"logits": "pooled", "pooled": "logits"}.get(self.layer)
        if self.layer in features:
            return self.layer
        if other is None or other not in features or not self.takes_other_layer:
            raise ValueError(f"these clips have no {self.layer}")
        return other

    def badness(self, value: T) -> T:
        """On a scale where more is worse, whatever is `best`; of one value or of many."""
        if self.best == "low":
            return value
        return -value if self.best == "high" else abs(value - 1)


def _frechet(reference: Array, candidate: Array, protocol: EvaluationProtocol) -> Prepared:
    unbiased = protocol.covariance == "unbiased"
    return Frechet(reference, candidate, unbiased=unbiased), None, {}


def _kernel(reference: Array, candidate: Array, protocol: EvaluationProtocol) -> Prepared:
    mmd = KernelMMD(reference, candidate)
    if protocol.kvd_subset_size is None:
        return mmd, None, {}
    mean, deviation = mmd.of_subsets(protocol.kvd_subset_size, protocol.kvd_subsets, protocol.seed)
    return mmd, mean, {"subset_deviation": deviation}


def _inception(reference: Array, candidate: Array, protocol: EvaluationProtocol) -> Prepared:
    score = InceptionScore(candidate, protocol.inception_splits)
    return lambda _, weights: score(weights).mean, None, {"split_deviation": score().deviation}


def _neighbours(part: Literal["precision", "recall", "density", "coverage"]) -> Any:
    """Manifolds stay those of all clips; which clips are asked about is resampled. Copies of a
    clip would be its nearest neighbours otherwise.
    """

    def prepare(reference: Array, candidate: Array, protocol: EvaluationProtocol) -> Prepared:
        of_two = part in ("precision", "recall")
        k = protocol.precision_neighbours if of_two else protocol.density_neighbours
        found = neighbourhoods(reference, candidate, k)
        each = {
            "precision": found.precise_M,
            "recall": found.recalled_N,
            "density": found.density_M,
            "coverage": found.covered_N,
        }[part]
        asked = int(part in ("precision", "density"))  # of the candidates, else of the reference

        def at(*weights: Array) -> float:
            return float(weights[asked] @ each / weights[asked].sum())

        return at, None, {}

    return prepare


def _mean(rows: Array, weights: Array) -> Array:
    mean: Array = weights @ rows / weights.sum()
    return mean


def _motion(reference: Array, candidate: Array, protocol: EvaluationProtocol) -> Prepared:
    def at(first: Array, second: Array) -> float:
        return motion_ratio(_mean(candidate, second)[0], _mean(reference, first)[0])

    return at, None, {"real": float(reference.mean()), "candidate": float(candidate.mean())}


def _persistence(reference: Array, candidate: Array, protocol: EvaluationProtocol) -> Prepared:
    def of(rows: Array, weights: Array) -> float:
        one, two = np.maximum(_mean(rows, weights), _LEAST_STEP)
        return float(two / one)

    def at(first: Array, second: Array) -> float:
        return of(candidate, second) / of(reference, first)

    details = {
        name: of(rows, np.ones(len(rows)))
        for name, rows in (("real", reference), ("candidate", candidate))
    }
    return at, None, details


def _spectra(reference: Array, candidate: Array, protocol: EvaluationProtocol) -> Prepared:
    num_places = len(psd_places(protocol.num_frames, protocol.psd_frames))

    def at(first: Array, second: Array) -> float:
        means = [
            torch.from_numpy(_mean(rows, weights)).view(num_places, -1)
            for rows, weights in ((candidate, second), (reference, first))
        ]
        return float(np.mean(spectral_distances(*means)))

    return at, None, {}


METRICS: dict[str, MetricDefinition] = {
    metric.name: metric
    for metric in (
        MetricDefinition("fvd", "logits", "low", _frechet, least=0.0),
        MetricDefinition("fid-k400", "pooled", "low", _frechet, least=0.0),
        MetricDefinition("kvd", "logits", "low", _kernel),
        MetricDefinition(
            "is-k400", "logits", "high", _inception, least=1.0, takes_other_layer=False
        ),
        MetricDefinition("precision", "pooled", "high", _neighbours("precision"), least=0.0),
        MetricDefinition("recall", "pooled", "high", _neighbours("recall"), least=0.0),
        MetricDefinition("density", "pooled", "high", _neighbours("density"), least=0.0),
        MetricDefinition("coverage", "pooled", "high", _neighbours("coverage"), least=0.0),
        MetricDefinition("motion", MOTION, "one", _motion, least=0.0),
        MetricDefinition("persistence", STEPS, "one", _persistence, least=0.0),
        MetricDefinition("psd", SPECTRA, "low", _spectra, least=0.0),
    )
}


def find_metrics(names: str | None, option: str = "--metric") -> list[MetricDefinition]:
    """Those named, separated by commas; all without a name. Raises UserError, about `option`."""
    if names is None:
        return list(METRICS.values())
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in METRICS:
            raise UserError(f"{option} {name!r} is none of {', '.join(METRICS)}")
    return [METRICS[name] for name in dict.fromkeys(wanted)]
