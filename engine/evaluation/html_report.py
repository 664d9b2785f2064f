"""An evaluation as one HTML page: the table, spectra, playing clips and the whole protocol.

Nothing is loaded from elsewhere: pictures are in the page, clips as an animated WebP.
"""

import base64
import io
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jinja2 import Environment
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import avg_pool2d

from engine.durable_files import PARTIAL, put_in_place, writing
from engine.evaluation.evaluation import Evaluation, figure
from engine.evaluation.metric_definitions import Measurement
from engine.video.writing import animation

_LEAST_PIXELS, _MOST_FRAMES = 64, 32
_PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Evaluation</title><style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem;
       padding: 0 1rem; }
table { border-collapse: collapse; } td, th { padding: .25rem .7rem; text-align: right; }
td:first-child, th:first-child, td:last-child, th:last-child { text-align: left; }
tr + tr { border-top: 1px solid #ddd; } small, .range { color: #666; } .blind { color: #b30000; }
pre { background: #f5f5f5; padding: .8rem; white-space: pre-wrap; } img { max-width: 100%; }
</style></head><body>
<h1>Evaluation of generated videos</h1>
<pre>{{ header }}</pre>
<table><tr>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}<tr><td>{{ row.name }}</td>
{% for cell in row.cells %}<td>{{ cell.value }}<br><span class="range">{{ cell.range }}</span></td>
{% endfor %}<td{% if row.blind %} class="blind"{% endif %}>{{ row.note }}</td></tr>
{% endfor %}</table>
<p>{% for line in legend %}<small>{{ line }}</small><br>{% endfor %}</p>
{% if clips %}<h2>Clips</h2><img alt="real, generated and spoilt clips" src="{{ clips }}">
<p><small>At most the first {{ most_frames }} frames.</small></p>{% endif %}
{% if spectra %}<h2>Power spectra</h2><img alt="power spectra by radius" src="{{ spectra }}">
<p><small>Mean of {{ num_sets }} sets of clips; the band is their standard deviation.</small></p>
{% endif %}
<h2>Protocol</h2><table>{% for key, value in protocol %}
<tr><td>{{ key }}</td><td>{{ value }}</td></tr>{% endfor %}</table>
</body></html>
"""


def write_report(path: Path, evaluation: Evaluation, fps: float = 12.5) -> None:
    """Write the page, whole or not at all. Raises UserError when it cannot be written.

    `fps` is how fast the clips play, which says nothing of the videos' own rate.
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
    page = Environment(autoescape=True).from_string(_PAGE)
    text = page.render(
        header="\n".join(evaluation.header()),
        columns=columns,
        rows=rows,
        legend=evaluation.legend(),
        clips=_clips(evaluation, fps),
        most_frames=_MOST_FRAMES,
        spectra=_spectra(evaluation.spectra),
        num_sets=evaluation.spectra.get("real", {}).get("num_sets"),
        protocol=list(evaluation.protocol.to_tree().items()),
    )
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + PARTIAL)
        partial.write_text(text, encoding="utf-8")
        put_in_place(partial, path)


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
    all_axes[0].set_ylabel("power")
    all_axes[0].legend()
    content = io.BytesIO()
    picture.savefig(content, format="svg")
    return _data_url(content.getvalue(), "image/svg+xml")


def _data_url(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
