"""The miniature's picture: power spectra at four frames, and strips of one clip of each model."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure, SubFigure
from PIL import Image

from benchmarks.miniature.measured import FRAMES, REAL, STRIP, ClipFigures
from benchmarks.miniature.models import MODELS, folder_of
from benchmarks.miniature.verdicts import Real, Results
from engine.durable_files import writing

_MOST_SEEDS_SHOWN = 2
_REAL_TITLE = "real"


def draw(path: Path, out: Path, results: Results, reals: Mapping[int, Real]) -> None:
    """Write the PNG at `path`, of the strips in `out`. Raises UserError when it cannot."""
    # A Figure by itself: pyplot would keep it in global state and look for a display.
    figure = Figure(figsize=(16, 13), layout="constrained")
    parts = figure.subfigures(2, 1, squeeze=False, height_ratios=(4, 9))
    spectra, strips = np.asarray(parts)[:, 0]
    _draw_spectra(spectra, results, reals)
    _draw_strips(strips, out, list(results)[:_MOST_SEEDS_SHOWN])
    with writing(path):
        figure.savefig(path, dpi=80, format="png")


def _draw_spectra(part: SubFigure, results: Results, reals: Mapping[int, Real]) -> None:
    """A plot per frame; each line is the mean over seeds, its band from the least to the most."""
    part.suptitle("Power spectral density of luminance (mean over clips)", fontsize=11)
    plots = part.subplots(1, len(FRAMES), sharey=True, squeeze=False)[0]
    real = next(iter(reals.values()))
    for place, (axes, frame) in enumerate(zip(plots, FRAMES, strict=True)):
        for number, model in enumerate(MODELS):
            curves_SR = _curves([models[model.name] for models in results.values()], place)
            radii = np.arange(1, curves_SR.shape[1] + 1)
            colour = f"C{number}"
            axes.plot(radii, np.exp(np.log(curves_SR).mean(0)), color=colour, label=model.title)
            axes.fill_between(
                radii, curves_SR.min(0), curves_SR.max(0), color=colour, alpha=0.15, linewidth=0
            )
        for measured, style, label in (
            (real.itself, "-", _REAL_TITLE),
            (real.other_half, ":", "real, others"),
        ):
            curve_R = _curves([measured], place)[0]
            radii = np.arange(1, len(curve_R) + 1)
            axes.plot(radii, curve_R, color="black", linestyle=style, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(f"frame {frame + 1}", fontsize=10)
        axes.set_xlabel("cycles per frame")
        axes.spines[["top", "right"]].set_visible(False)
    plots[0].legend(fontsize=7, frameon=False)


def _curves(measured: Sequence[ClipFigures], place: int) -> np.ndarray:
    """PSD by seed and radius from 1; nothing at all is drawn as very little."""
    curves_SR = np.array([one.spectra[place][1:] for one in measured])
    return np.maximum(curves_SR, 1e-9)


def _draw_strips(part: SubFigure, out: Path, seeds: Sequence[int]) -> None:
    """A row per model, a column per seed; the real clip is the same in every column."""
    names = [REAL, *(model.name for model in MODELS)]
    titles = [_REAL_TITLE, *(model.title for model in MODELS)]
    part.suptitle("The first clip, frames evenly spaced", fontsize=11)
    plots = part.subplots(len(names), len(seeds), squeeze=False)
    for row, (name, title) in enumerate(zip(names, titles, strict=True)):
        for column, seed in enumerate(seeds):
            axes = plots[row][column]
            with Image.open(folder_of(out, seed, name) / STRIP) as strip:
                axes.imshow(np.asarray(strip), interpolation="nearest")
            axes.set_axis_off()
            axes.set_title(f"{title}, seed {seed}" if name != REAL else title, fontsize=9)
