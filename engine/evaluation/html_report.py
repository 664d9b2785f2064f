"""An evaluation as one HTML page: tables, playing clips, spectra, curves, protocol, environment.

Nothing is loaded from elsewhere: pictures are in the page, clips as an animated WebP.
"""

import base64
import io
import platform
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np
import torch
import yaml
from jinja2 import Environment
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor
from torch.nn.functional import avg_pool2d

from engine.charts import training_figure
from engine.dummy_passes import TrainedCascade
from engine.durable_files import PARTIAL, put_in_place, writing
from engine.evaluation.evaluation import Evaluation, figure
from engine.evaluation.metric_definitions import Measurement
from engine.evaluation.report_page import PAGE
from engine.video.writing import animation

_LEAST_PIXELS, _MOST_FRAMES = 64, 32


def write_report(
    path: Path,
    evaluation: Evaluation,
    trained: TrainedCascade | None = None,
    fps: float = 12.5,
) -> None:
    """Write the page, whole or not at all. Raises UserError when it cannot be written.

    `trained` made the generated videos, where it is known. `fps` is how fast the clips play, which
    says nothing of the videos' own rate.
    """
    num = evaluation.num_control_clips
    names = ("generated", "real", "shuffled", "frozen")
    columns = ["metric", "generated, all", *(f"{name}, of {num}" for name in names), "verdict"]
    rows = []
    for row in evaluation.rows:
        shown = [None] * 4 if row.controls is None else [getattr(row.controls, n) for n in names]
        cells = [_cell(each) for each in (row.measurement, *shown)]
        blind = "blind" in row.note
        rows.append({"name": row.metric.name, "cells": cells, "note": row.note, "blind": blind})
    # Autoescaped: names of folders and files stand in the page.
    page = Environment(autoescape=True, trim_blocks=True).from_string(PAGE)
    text = page.render(
        header="\n".join(evaluation.header()),
        columns=columns,
        rows=rows,
        legend=evaluation.legend(),
        metrics=[row.metric.name for row in evaluation.rows],
        classes=[
            {
                "name": each.label,
                "num_real": each.num_real,
                "num_generated": each.num_generated,
                "cells": [_cell(each.by_metric[row.metric.name]) for row in evaluation.rows],
            }
            for each in evaluation.classes
        ],
        clips=_clips(evaluation, fps),
        most_frames=_MOST_FRAMES,
        curves=_curves(trained),
        spectra=_spectra(evaluation.spectra),
        num_sets=evaluation.spectra.get("real", {}).get("num_sets"),
        protocol=list(evaluation.protocol.to_tree().items()),
        trained=trained,
        configuration=trained and yaml.safe_dump(trained.config().to_tree(), sort_keys=False),
        environment=_environment(),
    )
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + PARTIAL)
        partial.write_text(text, encoding="utf-8")
        put_in_place(partial, path)


def _environment() -> dict[str, str]:
    """What the figures were computed with."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return {
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "NumPy": np.__version__,
        "PyAV": av.__version__,
        "device": device or platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
    }


def _curves(trained: TrainedCascade | None) -> str:
    """What the runs of all stages logged, where their folders are at hand."""
    if trained is None:
        return ""
    run = trained.path.absolute().parents[2]
    stages = range(1, trained.stage_number + 1)
    logs = {f"stage {n}": run / f"stage{n}" / "log.jsonl" for n in stages}
    found = {name: log for name, log in logs.items() if log.is_file()}
    return _svg(training_figure(found)) if found else ""


def _cell(found: Measurement | None) -> dict[str, str]:
    if found is None:
        return {"value": "-", "range": ""}
    ends = f"{figure(found.interval.low)} to {figure(found.interval.high)}"
    return {"value": figure(found.value), "range": ends}


def _clips(evaluation: Evaluation, fps: float) -> str:
    if not evaluation.examples:
        return ""
    rows = [(name, _to_look_at(video_BTCHW)) for name, video_BTCHW in evaluation.examples]
    height = rows[0][1].shape[-2]
    with TemporaryDirectory() as folder:
        file = Path(folder) / "clips.webp"
        animation(rows, file, fps, scale=max(1, _LEAST_PIXELS // height))
        return _data_url(file.read_bytes(), "image/webp")


def _to_look_at(video_BTCHW: Tensor) -> Tensor:
    """The beginning, at half the size or less where it is large: encoding takes its time."""
    shown = video_BTCHW[:, :_MOST_FRAMES]
    factor = min(shown.shape[-2:]) // _LEAST_PIXELS
    if factor < 2:
        return shown
    smaller = avg_pool2d(shown.flatten(0, 1).float(), factor).round().to(torch.uint8)
    return smaller.unflatten(0, shown.shape[:2])


def _spectra(found: dict[str, Any]) -> str:
    if not found:
        return ""
    picture = Figure(figsize=(3.2 * len(found["frames"]), 3), layout="constrained")
    all_axes = picture.subplots(1, len(found["frames"]), sharey=True, squeeze=False)[0]
    radii = found["radii_cycles_per_image"][1:]
    for number, (axes, frame) in enumerate(zip(all_axes, found["frames"], strict=True)):
        for role in ("real", "generated"):
            mean = found[role]["mean"][number][1:]
            spread = found[role]["deviation"][number][1:]
            axes.plot(radii, mean, label=role)
            low = [max(m - s, m / 10) for m, s in zip(mean, spread, strict=True)]
            high = [m + s for m, s in zip(mean, spread, strict=True)]
            axes.fill_between(radii, low, high, alpha=0.25)
        axes.set(title=f"frame {frame}", xlabel="cycles per image", xscale="log", yscale="log")
        pixels = 2 * radii[-1]
        per_pixel = axes.secondary_xaxis(
            "top", functions=(lambda c, n=pixels: c / n, lambda c, n=pixels: c * n)
        )
        per_pixel.set_xlabel("cycles per pixel")
        for axis in (axes.xaxis, per_pixel.xaxis):
            axis.set_minor_formatter(NullFormatter())
    all_axes[0].set_ylabel("power per frequency, |FFT|² / pixels")
    all_axes[0].legend()
    return _svg(picture)


def _svg(picture: Figure) -> str:
    content = io.BytesIO()
    picture.savefig(content, format="svg")
    return _data_url(content.getvalue(), "image/svg+xml")


def _data_url(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
