"""What a metric's value is worth: the same metric of real clips, as they are and spoilt.

FVD can fall while motion is lost, and frames out of order can leave it where it was (Ge et al.,
"On the Content Bias in Fréchet Video Distance", arXiv 2404.12391). So beside each value stand, of
equally many clips and against the same real clips:

- real against real: other real videos; what a perfect generator would get here,
- shuffled: those videos, with the frames of each in a random order,
- frozen: those videos, standing still at their first frame.

A metric that does not put real clips before spoilt ones cannot see that kind of damage with these
data and so few clips; the report then says "blind here". Decided: the difference must be outside
its bootstrap interval. The same resamples are drawn for all of these, so that the difference
between videos and the same videos spoilt is not drowned in the difference between videos.
"""

from typing import Any, NamedTuple

from engine.evaluation.bootstrap import BootstrapInterval, centred_interval
from engine.evaluation.metric_definitions import Measurement, MetricDefinition


class Controls(NamedTuple):
    """A metric of real clips."""

    real: Measurement
    shuffled: Measurement
    frozen: Measurement
    generated: Measurement
    """Of as many generated clips, against the same reference: to be compared with the others."""


def difference(
    metric: MetricDefinition, first: Measurement, second: Measurement
) -> BootstrapInterval:
    """How much worse the first is, with the interval of that, from paired resamples.

    In the metric's own units, of distances from 1 where that is best. Both are of as many clips.
    """
    found = metric.badness(first.resamples) - metric.badness(second.resamples)
    return centred_interval(found, metric.badness(first.value) - metric.badness(second.value))


def is_worse(metric: MetricDefinition, first: Measurement, second: Measurement) -> bool:
    """Whether the first is worse than the second, beyond the interval of their difference."""
    return difference(metric, first, second).low > 0


def controls_tree(metric: MetricDefinition, controls: Controls) -> dict[str, Any]:
    """For JSON: the measurements, and how much worse than real clips the others are."""
    measured = controls._asdict()
    worse = {
        name: difference(metric, each, controls.real)._asdict()
        for name, each in measured.items()
        if name != "real"
    }
    return {
        **{name: each.to_tree() for name, each in measured.items()},
        "worse_than_real_by": worse,
        "blind_to": blind_to(metric, controls),
    }


def blind_to(metric: MetricDefinition, controls: Controls) -> list[str]:
    """The kinds of damage that the metric does not see here."""
    spoilt = {"shuffled frames": controls.shuffled, "a frozen frame": controls.frozen}
    return [name for name, each in spoilt.items() if not is_worse(metric, each, controls.real)]


def verdict(metric: MetricDefinition, controls: Controls) -> str:
    """One line: blind to what, and where generated clips stand among the controls."""
    blind = blind_to(metric, controls)
    seen = "" if not blind else f"blind here to {blind[0]}; "
    generated = controls.generated
    if len(blind) == 2:
        worse = is_worse(metric, generated, controls.real)
        return "blind here; worse than real all the same" if worse else "blind here"
    if not is_worse(metric, generated, controls.real):
        return f"{seen}not told from real clips"
    spoilt = {"shuffled": controls.shuffled, "frozen": controls.frozen}
    reached = [name for name, each in spoilt.items() if not is_worse(metric, each, generated)]
    if not reached:
        return f"{seen}worse than real, better than spoilt clips"
    return f"{seen}worse than real, no better than {' or '.join(reached)}"
