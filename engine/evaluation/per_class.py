"""The same metrics class by class (the paper's Appendix G), where both sources have classes.

A class is the folder that a video lies in, or its label in an npz. There are few clips of each, so
that a class's values compare with those of other models with as many clips of it, and not with
values of whole data sets.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.errors import UserError
from engine.evaluation.clips import Selection
from engine.evaluation.metric_definitions import Features, Measurement, MetricDefinition
from engine.evaluation.protocol import EvaluationProtocol

_LEAST_CLIPS = 2


@dataclass(frozen=True)
class ClassMeasurements:
    """A class's values; None where a metric cannot be had of so few clips."""

    label: str
    num_real: int
    num_generated: int
    by_metric: dict[str, Measurement | None]

    def to_tree(self) -> dict[str, Any]:
        """For JSON."""
        measured = {name: each and each.to_tree() for name, each in self.by_metric.items()}
        return {
            "class": self.label,
            "num_real": self.num_real,
            "num_generated": self.num_generated,
            "metrics": measured,
        }


def labels_of(selection: Selection) -> list[str | None]:
    """Each clip's class."""
    return [selection.source.label(clip.number) for clip in selection.clips]


def common_classes(real: Selection, generated: Selection) -> list[str]:
    """Classes with two clips or more in both. Raises UserError where there is none."""
    counts = [Counter(labels_of(selection)) for selection in (real, generated)]
    found = [
        label
        for label in sorted(each for each in counts[0] if each is not None)
        if min(count[label] for count in counts) >= _LEAST_CLIPS
    ]
    if not found:
        named = [
            ", ".join(sorted(label for label in count if label is not None)[:4]) or "none"
            for count in counts
        ]
        raise UserError(
            f"no class has {_LEAST_CLIPS} clips in both sources (real: {named[0]}; generated: "
            f"{named[1]}); videos lie in a folder for each class, or an npz has labels"
        )
    return found


def measure_classes(
    selections: tuple[Selection, Selection],
    features: tuple[Features, Features],
    metrics: list[MetricDefinition],
    protocol: EvaluationProtocol,
    *,
    num_resamples: int,
) -> list[ClassMeasurements]:
    """All metrics of each of the `common_classes`; features are of the selections' clips."""
    labels = [np.array(labels_of(selection), dtype=object) for selection in selections]
    rows = []
    for label in common_classes(*selections):
        places = [np.flatnonzero(each == label) for each in labels]
        real, generated = (
            {name: layer[chosen] for name, layer in of.items()}
            for of, chosen in zip(features, places, strict=True)
        )
        measured: dict[str, Measurement | None] = {}
        for metric in metrics:
            try:
                measured[metric.name] = metric.measure(
                    real, generated, protocol, num_resamples=num_resamples
                )
            except ValueError:
                measured[metric.name] = None
        rows.append(ClassMeasurements(label, len(places[0]), len(places[1]), measured))
    return rows
