"""A report in a browser: pictures load, nothing comes from elsewhere, nothing overflows."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from small_runs import call

import engine.evaluate
from engine.video.procedural import render_clip

_NAMES = "chromium", "chromium-browser", "google-chrome"
BROWSER = next(filter(None, map(shutil.which, _NAMES)), "")
pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium is installed")

# A browser's window is at least 500 pixels wide; a frame can be narrower.
_MEASURING = """<!doctype html><body style="margin:0">
<iframe style="border:0" width={width} height=3000 srcdoc="{page}"></iframe><script>
addEventListener("load", () => {{
  const inside = document.querySelector("iframe").contentWindow, shown = inside.document;
  document.documentElement.dataset.found = encodeURIComponent(JSON.stringify({{
    width: shown.documentElement.scrollWidth,
    pictures: [...shown.images].map(image => image.naturalWidth),
    fetched: inside.performance.getEntriesByType("resource").map(entry => entry.name)
      .filter(name => !name.startsWith("data:")),
  }}));
}});</script>"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    for seed, name in enumerate(("real", "generated")):
        clips = np.stack([render_clip(n % 8, seed, n, 10, 32) for n in range(8)])
        np.savez(folder / f"{name}.npz", videos=clips, labels=np.arange(8) % 2)
    sources = ("--real", folder / "real.npz", "--generated", folder / "generated.npz")
    settings = ("--metric", "motion,psd", "--per-class", "--set", "num_frames=10")
    places = ("--cache", folder / "features", "--report", folder / "report.html")
    finished = call(engine.evaluate.main, *sources, *settings, *places, "--resamples", "10")
    assert finished.code == 0, finished.err
    return (folder / "report.html").read_text()


def shown(page: str, width: int, folder: Path) -> dict[str, Any]:
    """What a browser makes of a page in a window of `width` pixels."""
    file = folder / "measuring.html"
    file.write_text(_MEASURING.format(width=width, page=html.escape(page)))
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000")
    own = f"--user-data-dir={folder / 'profile'}"
    command = [BROWSER, *options, own, "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    (found,) = re.findall(r'data-found="([^"]*)"', done.stdout)
    tree: dict[str, Any] = json.loads(unquote(found))
    return tree


@pytest.mark.parametrize("width", [1200, 400])
def test_pictures_load_and_nothing_overflows(report: str, width: int, tmp_path: Path) -> None:
    found = shown(report, width, tmp_path)
    assert found["width"] <= width
    assert len(found["pictures"]) >= 2  # clips and spectra
    assert min(found["pictures"]) > 0
    assert found["fetched"] == []


def test_faults_are_found(report: str, tmp_path: Path) -> None:
    broken = report.replace("data:image/webp;base64,", "data:image/webp;base64,AAAA", 1)
    assert min(shown(broken, 1200, tmp_path)["pictures"]) == 0
    elsewhere = report.replace("</body>", '<img src="http://127.0.0.1:9/gone.png"></body>')
    assert shown(elsewhere, 1200, tmp_path)["fetched"] == ["http://127.0.0.1:9/gone.png"]
    wide = report.replace("</body>", '<div style="width:900px">x</div></body>')
    assert shown(wide, 400, tmp_path)["width"] > 400
