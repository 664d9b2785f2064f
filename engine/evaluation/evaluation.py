"""An evaluation: two sources of videos, a protocol, metrics; a table with controls beside values.

`evaluate` is what `engine/evaluate.py` calls. Features come first, of the real clips, the generated
ones, and half of the real ones spoilt in two ways; then everything else is arithmetic on them.

Which real clips are compared with what: the reference is the protocol's `num_videos` of them, or
all. For the controls two disjoint sets of real clips are needed, A and B, as large as the generated
set, or half of the real clips each where there are not twice as many. Real against real is B
against A; spoilt B against A; and generated clips, as many, against A, which is the value that the
controls may be compared with.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.errors import UserError
from engine.evaluation.clips import Selection, View, check_sizes, choose_clips, read_clip, viewed
from engine.evaluation.controls import Controls, controls_tree, verdict
from engine.evaluation.feature_networks import FeatureNetwork
from engine.evaluation.features import Features, Throughput, extract, merge
from engine.evaluation.frame_features import SPECTRA, psd_places
from engine.evaluation.metric_definitions import Measurement, MetricDefinition
from engine.evaluation.per_class import ClassMeasurements, common_classes, measure_classes
from engine.evaluation.protocol import EvaluationProtocol
from engine.evaluation.video_sources import VideoSource
from engine.trainer.ranks import Ranks

_MARKS = {"low": "lower is better", "high": "higher is better", "one": "1 is as real"}
_NUM_EXAMPLES = 4
_SPOILT: tuple[View, ...] = ("shuffled", "frozen")


@dataclass(frozen=True)
class EvaluationRow:
    """A metric's line of the table."""

    metric: MetricDefinition
    measurement: Measurement | None
    """None where it cannot be measured."""
    controls: Controls | None
    """None where there are too few real videos."""
    note: str
    """The verdict, or why there is no value."""

    def to_tree(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "metric": self.metric.name,
            "layer": self.measurement and self.measurement.layer,
            "best": self.metric.best,
            "measurement": self.measurement and self.measurement.to_tree(),
            "controls": self.controls and controls_tree(self.metric, self.controls),
            "verdict": self.note,
        }


@dataclass(frozen=True)
class Evaluation:
    """Everything that was found, and how."""

    protocol: EvaluationProtocol
    selections: tuple[Selection, Selection]
    """Real, generated."""
    rows: tuple[EvaluationRow, ...]
    num_control_clips: int
    """In each of the controls' sets."""
    throughput: Throughput
    spectra: dict[str, Any]
    """Power spectra of both sources; empty where frames are not square."""
    classes: list[ClassMeasurements] = field(default_factory=list)
    """Empty where they were not asked for."""
    examples: list[tuple[str, Tensor]] = field(default_factory=list)
    """Rows of clips for a person: what they are, and uint8 [B, T, C, H, W]."""

    def to_tree(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "protocol": self.protocol.to_tree(),
            **{
                selection.role: {
                    "path": selection.source.path,
                    "num_videos": len(selection.source),
                    "num_clips": len(selection.clips),
                    "num_dropped": selection.num_dropped,
                    "num_looped": selection.num_looped,
                    "videos": [selection.source.names[clip.number] for clip in selection.clips],
                }
                for selection in self.selections
            },
            "num_control_clips": self.num_control_clips,
            "throughput": self.throughput._asdict(),
            "metrics": [row.to_tree() for row in self.rows],
            "classes": [each.to_tree() for each in self.classes] or None,
            "spectra": self.spectra or None,
        }

    def table(self) -> str:
        """For a person."""
        num = self.num_control_clips
        head = ["metric", "generated", "95 % interval", f"of {num}", "real", "shuffled", "frozen"]
        lines = [[*head, "verdict"]]
        for row in self.rows:
            found, controls = row.measurement, row.controls
            cells = [row.metric.name, "-", "-"] if found is None else _cells(row.metric.name, found)
            if controls is None:
                cells += ["-"] * 4
            else:
                shown = (controls.generated, controls.real, controls.shuffled, controls.frozen)
                cells += [figure(each.value) for each in shown]
            lines.append([*cells, row.note])
        texts = [*self.header(), "", *_aligned(lines), "", *self.legend()]
        return "\n".join([*texts, *self._class_table()])

    def _class_table(self) -> list[str]:
        """Values class by class; their intervals stand in the file."""
        if not self.classes:
            return []
        names = [row.metric.name for row in self.rows]
        lines = [["class", "real", "generated", *names, ""]]
        for each in self.classes:
            values = [each.by_metric[name] for name in names]
            cells = ["-" if value is None else figure(value.value) for value in values]
            lines.append([each.label, str(each.num_real), str(each.num_generated), *cells, ""])
        return ["", "of each class, generated against all of its real clips:", *_aligned(lines)]

    def header(self) -> list[str]:
        """What was compared, and by which protocol."""
        lines = [line for selection in self.selections for line in selection.lines()]
        asked = self.protocol.num_videos
        for selection in self.selections:
            if asked is not None and len(selection.clips) < asked:
                lines.append(
                    f"note: the protocol asks for {asked} {selection.role} videos, here are "
                    f"{len(selection.clips)}; FVD and FID of fewer videos are higher, so do not "
                    "compare them with published ones"
                )
        return [*lines, *self.protocol.lines(), self.throughput.line()]

    def legend(self) -> list[str]:
        """What the columns are."""
        first = next((row.measurement for row in self.rows if row.measurement), None)
        lines = []
        if first is not None:
            lines.append(
                f"generated: {first.num_candidates} generated clips against {first.num_reference} "
                f"real ones; interval: centred percentiles of {first.interval.num_resamples} "
                f"bootstrap resamples, seed {self.protocol.seed}"
            )
        if self.num_control_clips:
            lines.append(
                f"of {self.num_control_clips}: as many generated clips, real ones, and real ones "
                "with shuffled or frozen frames, all against the same as many other real ones"
            )
        for best, text in _MARKS.items():
            names = [row.metric.name for row in self.rows if row.metric.best == best]
            if names:
                lines.append(f"{text}: {', '.join(names)}")
        return lines


def evaluate(
    real: VideoSource,
    generated: VideoSource,
    protocol: EvaluationProtocol,
    metrics: list[MetricDefinition],
    network: FeatureNetwork | None,
    cache: Path,
    *,
    num_resamples: int = 200,
    batch_size: int = 4,
    per_class: bool = False,
) -> Evaluation:
    """Choose clips, extract features, measure. `network` may be None where no metric needs it.

    Raises UserError, before features are extracted, where videos are damaged, too short or of
    several sizes, or where there are no classes and `per_class` asks for them.
    """
    given = real, generated, protocol, metrics, network, cache
    found = evaluate_together(
        *given,
        Ranks.alone(torch.device("cpu")),
        num_resamples=num_resamples,
        batch_size=batch_size,
        per_class=per_class,
    )
    assert found is not None, "of rank 0"
    return found


def evaluate_together(
    real: VideoSource,
    generated: VideoSource,
    protocol: EvaluationProtocol,
    metrics: list[MetricDefinition],
    network: FeatureNetwork | None,
    cache: Path,
    ranks: Ranks,
    *,
    num_resamples: int,
    batch_size: int,
    per_class: bool,
) -> Evaluation | None:
    """As `evaluate`, by ranks that see one `cache` and extract a share of the features each.

    Rank 0 measures; the others return None when it can begin. Collective.
    """
    if network is not None:
        protocol.check_frames(network.least_frames)
        named = {"network": network.name, "network_sha256": network.sha256}
    else:
        named = {"network": "none"}
    protocol = protocol.model_copy(update=named)
    asked = protocol.num_videos
    generated_clips = choose_clips(generated, "generated", protocol, asked)
    # Twice as many, for the controls.
    real_clips = choose_clips(real, "real", protocol, None if asked is None else 2 * asked)
    check_sizes([real_clips, generated_clips], protocol)
    if per_class:
        common_classes(real_clips, generated_clips)
    num_real, num_generated = len(real_clips.clips), len(generated_clips.clips)
    num_reference = num_real if asked is None else min(asked, num_real)
    num_controls = min(num_generated, num_real // 2)
    second = range(num_controls, 2 * num_controls)
    parts: dict[str, tuple[Selection, range, View]] = {
        "real": (real_clips, range(num_real), "plain"),
        "generated": (generated_clips, range(num_generated), "plain"),
    }
    if num_controls >= 2:
        parts |= {view: (real_clips, second, view) for view in _SPOILT}
    done = [
        extract(
            *part,
            protocol,
            network,
            cache,
            batch_size=batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
        for part in parts.values()
    ]
    ranks.barrier()
    if not ranks.is_main:
        return None
    found = {name: merge(*part, protocol, network, cache) for name, part in parts.items()}
    of_real, of_generated = found["real"], found["generated"]
    spoilt: dict[str, Features] = {view: found[view] for view in _SPOILT if view in found}
    compared: dict[str, Features] = {
        "reference": _part(of_real, range(num_reference)),
        "generated": of_generated,
    }
    if spoilt:
        compared |= {
            "first": _part(of_real, range(num_controls)),
            "real": _part(of_real, second),
            "few generated": _part(of_generated, range(num_controls)),
            **spoilt,
        }
    rows = [_row(metric, compared, protocol, num_resamples) for metric in metrics]
    selections = (real_clips, generated_clips)
    return Evaluation(
        protocol,
        selections,
        tuple(rows),
        num_controls if spoilt else 0,
        Throughput.total(done),
        _spectra(_part(of_real, range(num_reference)), of_generated, protocol),
        measure_classes(
            selections, (of_real, of_generated), metrics, protocol, num_resamples=num_resamples
        )
        if per_class
        else [],
        _examples(selections, protocol),
    )


def _row(
    metric: MetricDefinition,
    compared: Mapping[str, Features],
    protocol: EvaluationProtocol,
    num_resamples: int,
) -> EvaluationRow:
    """The metric of `generated` against `reference`, and the controls' against `first`."""

    def measure(reference: str, candidate: str) -> Measurement:
        features = compared[reference], compared[candidate]
        return metric.measure(*features, protocol, num_resamples=num_resamples)

    try:
        found = measure("reference", "generated")
    except ValueError as error:
        return EvaluationRow(metric, None, None, f"not measured: {error}")
    if "real" not in compared:
        return EvaluationRow(metric, found, None, "no controls: too few real videos")
    try:
        controls = Controls(
            real=measure("first", "real"),
            shuffled=measure("first", "shuffled"),
            frozen=measure("first", "frozen"),
            generated=measure("first", "few generated"),
        )
    except ValueError as error:
        return EvaluationRow(metric, found, None, f"no controls: {error}")
    return EvaluationRow(metric, found, controls, verdict(metric, controls))


def figure(value: float) -> str:
    """A number for the table: four significant digits, and no exponent unless it is tiny."""
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.{max(0, 3 - len(str(int(abs(value)))) + 1)}f}"


def _aligned(lines: list[list[str]]) -> list[str]:
    """Columns: the first and the last to the left, the others to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    texts = []
    for first, *middle, last in lines:
        padded = [cell.rjust(width) for cell, width in zip(middle, widths[1:-1], strict=True)]
        texts.append("  ".join([first.ljust(widths[0]), *padded, last]).rstrip())
    return texts


def _cells(name: str, found: Measurement) -> list[str]:
    ends = f"{figure(found.interval.low)} to {figure(found.interval.high)}"
    return [name, figure(found.value), ends]


def _part(features: Features, numbers: range) -> Features:
    return {name: rows[numbers.start : numbers.stop] for name, rows in features.items()}


def _spectra(real: Features, generated: Features, protocol: EvaluationProtocol) -> dict[str, Any]:
    """The paper's Appendix E: mean PSD by radius at some frames, and the deviation over sets.

    Clips are divided into `psd_sets` sets; the mean and the deviation (divided by their number) are
    of the sets' means. Radii are cycles per image; over the side they are cycles per pixel.
    """
    places = psd_places(protocol.num_frames, protocol.psd_frames)
    if SPECTRA not in real or SPECTRA not in generated or not places:
        return {}
    found: dict[str, Any] = {"frames": [place + 1 for place in places]}
    for role, features in (("real", real), ("generated", generated)):
        rows = np.asarray(features[SPECTRA], np.float64)
        num_sets = min(protocol.psd_sets, len(rows))
        sets = [
            part.mean(axis=0).reshape(len(places), -1) for part in np.array_split(rows, num_sets)
        ]
        found[role] = {
            "mean": np.mean(sets, axis=0).tolist(),
            "deviation": np.std(sets, axis=0).tolist(),
            "num_sets": num_sets,
            "num_clips": len(rows),
        }
    found["radii_cycles_per_image"] = list(range(len(found["real"]["mean"][0])))
    return found


def _examples(
    selections: tuple[Selection, Selection], protocol: EvaluationProtocol
) -> list[tuple[str, Tensor]]:
    """The first clips of both sources, and the real ones spoilt."""
    num = min(_NUM_EXAMPLES, *(len(selection.clips) for selection in selections))
    shown: list[tuple[Selection, View]] = [(selections[0], "plain"), (selections[1], "plain")]
    shown += [(selections[0], "shuffled"), (selections[0], "frozen")]
    rows = []
    for selection, view in shown:
        clips = [
            viewed(read_clip(selection.source, clip, protocol), view, clip.digest, protocol.seed)
            for clip in selection.clips[:num]
        ]
        name = selection.role if view == "plain" else f"{selection.role}, {view}"
        try:
            video = torch.from_numpy(np.stack(clips)).permute(0, 1, 4, 2, 3)
        except ValueError as error:
            raise UserError(f"clips differ in size: {error}") from None
        rows.append((name, video))
    return rows
