"""The training curves of a run's stages as one picture."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engine.durable_files import writing
from engine.errors import UserError

LOSSES = {"loss_D": "D", "loss_G": "G"}
ACCURACIES = {"accuracy_D_real": "real", "accuracy_D_fake": "generated"}
COLOURS = ("tab:blue", "tab:orange")
CHANCE = 0.5

Series = dict[str, list[float]]


def loss_curves(logs: Mapping[str, Path], path: Path) -> None:
    """Draw each stage's log (name → JSON lines) into one PNG at `path`.

    One row per stage: hinge losses of D and G on the left, on the right the share of scores
    whose sign is right. Raises UserError for a log that is missing, empty or damaged; only a last
    line without its end, left by a run that was cut off, is passed over. UserError as well when the
    PNG cannot be written.
    """
    figure = loss_figure(logs)
    with writing(path):
        figure.savefig(path, dpi=100, format="png")


def loss_figure(logs: Mapping[str, Path]) -> Figure:
    """The picture that `loss_curves` writes."""
    if not logs:
        raise ValueError("no logs to draw")
    # A Figure by itself: pyplot would keep it in global state and look for a display.
    figure = Figure(figsize=(10, 3 * len(logs)), layout="constrained")
    rows = figure.subplots(len(logs), 2, squeeze=False)
    for (name, log), (losses, accuracies) in zip(logs.items(), rows, strict=True):
        series = read_log(log)
        _draw(losses, series, LOSSES, f"{name}: losses")
        _draw(accuracies, series, ACCURACIES, f"{name}: D accuracy")
        accuracies.axhline(CHANCE, color="grey", linestyle=":", linewidth=1, label="chance")
        accuracies.set_ylim(-0.03, 1.03)
        for axes in (losses, accuracies):
            axes.legend(loc="best", frameon=False)
    for axes in rows[-1]:
        axes.set_xlabel("generator updates")
    return figure


def read_log(path: Path) -> Series:
    """The steps, losses and accuracies of a stage's log, one value per logged step each.

    Raises UserError as `loss_curves` does.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read log {path}: {error.strerror}") from None
    lines = text.split("\n")
    lines.pop()  # empty after the last newline; otherwise the line that a crash cut short
    series: Series = {key: [] for key in ("step", *LOSSES, *ACCURACIES)}
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except ValueError:
            raise UserError(f"{path}, line {number}: damaged, not a JSON object") from None
        for key, values in series.items():
            value = entry.get(key) if isinstance(entry, dict) else None
            if not isinstance(value, int | float):
                raise UserError(f"{path}, line {number}: no number {key!r}")
            values.append(value)
    if not lines:
        raise UserError(f"log {path} has no entries yet")
    return series


def moving_average(values: Sequence[float], width: int) -> np.ndarray:
    """Mean over a centred window of `width` (odd) values, narrower where it meets the ends."""
    ones = np.ones(width)
    total = np.convolve(values, ones, mode="full")[width // 2 :][: len(values)]
    return total / np.convolve(np.ones(len(values)), ones, mode="full")[width // 2 :][: len(values)]


def _draw(axes: Axes, series: Series, labels: Mapping[str, str], title: str) -> None:
    """Each series twice: faint as it was logged, and averaged so that its course shows."""
    steps = series["step"]
    width = len(steps) // 20 * 2 + 1  # a tenth of the run
    for (key, label), colour in zip(labels.items(), COLOURS, strict=True):
        axes.plot(steps, series[key], color=colour, alpha=0.3, linewidth=1)
        smooth = moving_average(series[key], width)
        # A single logged step makes no line.
        marker = "o" if len(steps) == 1 else None
        axes.plot(steps, smooth, color=colour, linewidth=1.8, marker=marker, label=label)
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
