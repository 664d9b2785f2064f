"""The training curves of a run's stages as one picture."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engine.durable_files import writing
from engine.errors import UserError

LOSSES = {"loss_D": "D", "loss_G": "G"}
ACCURACIES = {"accuracy_D_real": "real", "accuracy_D_fake": "generated"}
# engine/trainer/snapshots.py; not every stage has all of them, and old logs have none.
WINDOWS = {"window/motion_ratio": "motion", "window/variety": "variety", "window/judder": "judder"}
# engine/trainer/checkpoint_meta.py; where the run evaluates.
EVALUATION, OF_REAL = "evaluation/", "/real"
COLOURS = ("tab:blue", "tab:orange", "tab:green")
CHANCE = 0.5
AS_REAL = 1.0

Series = dict[str, list[float]]
Curve = tuple[list[float], list[float]]
"""Steps and values."""


def training_curves(logs: Mapping[str, Path], path: Path) -> None:
    """Draw each stage's log (name → JSON lines) into one PNG at `path`: `training_figure`.

    Raises UserError for a log that is missing, empty or damaged; only a last line without its end,
    left by a run that was cut off, is passed over. UserError as well when the PNG cannot be
    written.
    """
    figure = training_figure(logs)
    with writing(path):
        figure.savefig(path, dpi=100, format="png")


def training_figure(logs: Mapping[str, Path]) -> Figure:
    """What runs logged, in one picture.

    At the top a panel for each metric that was evaluated in training, with a line for each log, so
    that runs compare. Below a row for each log: hinge losses of D and G, beside them the share of
    scores whose sign is right and, where they were logged, figures of the training windows.
    """
    if not logs:
        raise ValueError("no logs to draw")
    evaluations = {name: read_evaluations(log) for name, log in logs.items()}
    windows = {name: read_windows(log) for name, log in logs.items()}
    metrics = list(dict.fromkeys(name for found in evaluations.values() for name in found))
    num_columns = 3 if any(windows.values()) or len(metrics) > 2 else 2
    num_metric_rows = -(-len(metrics) // num_columns)
    num_rows = num_metric_rows + len(logs)
    # A Figure by itself: pyplot would keep it in global state and look for a display.
    figure = Figure(figsize=(5 * num_columns, 3 * num_rows), layout="constrained")
    grid = figure.add_gridspec(num_rows, num_columns)
    for position, metric in enumerate(metrics):
        axes = figure.add_subplot(grid[divmod(position, num_columns)])
        found = {name: each[metric] for name, each in evaluations.items() if metric in each}
        _draw_metric(axes, found)
        _finish(axes, f"evaluated: {metric}")
    for row, (name, log) in enumerate(logs.items(), start=num_metric_rows):
        losses, accuracies = (figure.add_subplot(grid[row, column]) for column in range(2))
        series = read_log(log)
        _draw(losses, series, LOSSES, f"{name}: losses")
        _draw(accuracies, series, ACCURACIES, f"{name}: D accuracy")
        accuracies.axhline(CHANCE, color="grey", linestyle=":", linewidth=1, label="chance")
        accuracies.set_ylim(-0.03, 1.03)
        for axes in (losses, accuracies):
            axes.legend(loc="best", frameon=False)
        drawn = [losses, accuracies]
        if windows[name]:
            drawn.append(figure.add_subplot(grid[row, 2]))
            _draw_windows(drawn[2], windows[name], f"{name}: training windows, parts of real")
        if row == num_rows - 1:
            for axes in drawn:
                axes.set_xlabel("generator updates")
    return figure


def read_log(path: Path) -> Series:
    """The steps, losses and accuracies of a stage's log, one value per logged step each.

    Raises UserError as `training_curves` does.
    """
    series: Series = {key: [] for key in ("step", *LOSSES, *ACCURACIES)}
    for number, entry in _entries(path):
        for key, values in series.items():
            values.append(_number(entry, key, path, number))
    return series


def read_windows(path: Path) -> dict[str, Curve]:
    """The figures of training windows in a stage's log, by key; those that it has.

    Raises UserError as `training_curves` does.
    """
    return _read_curves(path, lambda key: key in WINDOWS)


def read_evaluations(path: Path) -> dict[str, "EvaluationCurve"]:
    """The metrics that a stage's log has of evaluations, by name.

    Raises UserError as `training_curves` does.
    """
    found = _read_curves(path, lambda key: key.startswith(EVALUATION))
    return {
        key.removeprefix(EVALUATION): EvaluationCurve(*curve, found.get(key + OF_REAL, ([], []))[1])
        for key, curve in found.items()
        if not key.endswith(OF_REAL)
    }


class EvaluationCurve(NamedTuple):
    """A metric in the course of training."""

    steps: list[float]
    values: list[float]
    of_real: list[float]
    """The same of real clips, compared with others; of one protocol always the same."""


def _read_curves(path: Path, wanted: Callable[[str], bool]) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    for number, entry in _entries(path):
        for key in filter(wanted, entry if isinstance(entry, dict) else ()):
            steps, values = curves.setdefault(key, ([], []))
            steps.append(_number(entry, "step", path, number))
            values.append(_number(entry, key, path, number))
    return curves


def _entries(path: Path) -> Iterator[tuple[int, Any]]:
    """The log's lines, numbered from 1; UserError where there are none, or damaged ones."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read log {path}: {error.strerror}") from None
    lines = text.split("\n")
    lines.pop()  # empty after the last newline; otherwise the line that a crash cut short
    if not lines:
        raise UserError(f"log {path} has no entries yet")
    for number, line in enumerate(lines, start=1):
        try:
            yield number, json.loads(line)
        except ValueError:
            raise UserError(f"{path}, line {number}: damaged, not a JSON object") from None


def _number(entry: Any, key: str, path: Path, number: int) -> float:
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, int | float):
        raise UserError(f"{path}, line {number}: no number {key!r}")
    return value


def moving_average(values: Sequence[float], width: int) -> np.ndarray:
    """Mean over a centred window of `width` (odd) values, narrower where it meets the ends."""
    ones = np.ones(width)
    total = np.convolve(values, ones, mode="full")[width // 2 :][: len(values)]
    return total / np.convolve(np.ones(len(values)), ones, mode="full")[width // 2 :][: len(values)]


def _draw(axes: Axes, series: Series, labels: Mapping[str, str], title: str) -> None:
    """Each series twice: faint as it was logged, and averaged so that its course shows."""
    steps = series["step"]
    width = len(steps) // 20 * 2 + 1  # a tenth of the run
    for (key, label), colour in zip(labels.items(), COLOURS, strict=False):
        axes.plot(steps, series[key], color=colour, alpha=0.3, linewidth=1)
        smooth = moving_average(series[key], width)
        # A single logged step makes no line.
        marker = "o" if len(steps) == 1 else None
        axes.plot(steps, smooth, color=colour, linewidth=1.8, marker=marker, label=label)
    _finish(axes, title)


def _draw_metric(axes: Axes, curves: Mapping[str, EvaluationCurve]) -> None:
    """A line for each run, and a dotted one for what real clips have."""
    for name, curve in curves.items():
        (line,) = axes.plot(curve.steps, curve.values, linewidth=1.8, marker="o", label=name)
        if curve.of_real:
            colour, label = line.get_color(), f"{name}, real clips"
            axes.plot(curve.steps, curve.of_real, color=colour, linestyle=":", label=label)
    axes.set_xlim(left=0)
    axes.legend(loc="best", frameon=False)


def _draw_windows(axes: Axes, curves: Mapping[str, Curve], title: str) -> None:
    """Few points, so drawn as they are; 1 is what real windows have."""
    for (key, label), colour in zip(WINDOWS.items(), COLOURS, strict=True):
        if key in curves:
            axes.plot(*curves[key], color=colour, linewidth=1.8, marker="o", label=label)
    axes.axhline(AS_REAL, color="grey", linestyle=":", linewidth=1, label="real")
    axes.set_ylim(bottom=0, top=1.08 * axes.get_ylim()[1])
    axes.set_xlim(left=0)
    axes.legend(loc="best", frameon=False)
    _finish(axes, title)


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
