"""evaluate.py: what it prints and writes, and its mistakes in one line before anything is lost."""

import base64
import json
import re
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forks import Forks
from PIL import Image
from small_runs import Finished, call, full_disk
from torch import Tensor, nn

import engine.evaluate
from engine.evaluation.video_sources import open_source
from engine.video.lossless import write_pngs
from engine.video.procedural import render_clip
from engine.video.writing import write_mp4

NUM_REAL, NUM_GENERATED = 20, 10
SETTINGS = ("--set", "num_frames=10", "--set", "inception_splits=2", "--resamples", "20")


class Statistics(nn.Module):
    """Mean colours and mean steps of uint8 clips."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = x.double() / 255
        seen = torch.cat([x.mean(dim=[2, 3, 4]), 20 * x.diff(dim=2).abs().mean(dim=[2, 3, 4])], 1)
        return {"logits": seen, "pooled": torch.cat([seen, seen.square()], dim=1)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real mp4s, of two classes and sizes that differ from the generated npz's, and a network."""
    folder = tmp_path_factory.mktemp("evaluate")
    for number in range(NUM_REAL):
        name = f"{'ab'[number % 2]}/{number:03d}.mp4"
        write_mp4(folder / "real" / name, render_clip(number % 8, 0, number, 12, 32), 8)
    generated = np.stack([render_clip(n % 8, 1, n, 10, 16) for n in range(NUM_GENERATED)])
    np.savez(folder / "samples.npz", videos=generated)
    torch.jit.script(Statistics()).save(str(folder / "network.pt"))
    return folder


def evaluate(place: Path, *arguments: str | Path) -> Finished:
    named = ("--real", place / "real", "--generated", place / "samples.npz")
    network = ("--network", place / "network.pt", "--network-input", "uint8")
    cache = ("--cache", place / "features")
    return call(engine.evaluate.main, *named, *network, *cache, *SETTINGS, *arguments)


def measured(place: Path, tmp_path: Path, *arguments: str | Path) -> dict[str, Any]:
    out = tmp_path / "new" / "found.json"
    finished = evaluate(place, "--set", "resolution=16", "--out", out, *arguments)
    assert finished.code == 0, finished.err
    tree: dict[str, Any] = json.loads(out.read_text())
    return {**tree, "printed": finished.out}


def test_the_table_and_the_file(place: Path, tmp_path: Path) -> None:
    tree = measured(place, tmp_path)
    printed = tree["printed"]
    assert f"real: {NUM_REAL} of {NUM_REAL} videos, {place / 'real'}" in printed
    assert "note: the protocol asks for 2048 generated videos, here are 10" in printed
    assert tree["num_control_clips"] == 10
    assert tree["protocol"]["network"] == "network.pt"
    assert tree["protocol"]["name"].startswith("stylegan-v, changed: num_frames=10")
    assert sorted(tree["real"]["videos"])[:2] == ["a/000.mp4", "a/002.mp4"]
    names = [row["metric"] for row in tree["metrics"]]
    assert names[:2] == ["fvd", "fid-k400"]
    for row in tree["metrics"]:
        assert (
            row["measurement"]["low"] <= row["measurement"]["value"] <= row["measurement"]["high"]
        )
        (line,) = (each for each in printed.splitlines() if each.startswith(f"{row['metric']} "))
        assert line.endswith(row["verdict"])
    (motion,) = (row for row in tree["metrics"] if row["metric"] == "motion")
    assert motion["controls"]["blind_to"] == []


def test_a_second_run_computes_nothing_and_finds_the_same(place: Path, tmp_path: Path) -> None:
    first, second = (measured(place, tmp_path / name, "--set", "seed=5") for name in "ab")
    assert first["throughput"]["num_computed"] > 0
    assert second["throughput"]["num_computed"] == 0
    assert first["metrics"] == second["metrics"]
    other = measured(place, tmp_path / "c", "--set", "seed=6")
    assert other["throughput"]["num_computed"] > 0
    assert other["metrics"] != first["metrics"]


def test_frames_and_the_archive_of_them_are_the_same_videos(place: Path, tmp_path: Path) -> None:
    videos = np.load(place / "samples.npz")["videos"]
    for number, video in enumerate(videos):
        write_pngs(tmp_path / "frames" / f"clip-{number:03d}", video)
    source = open_source(tmp_path / "frames")
    assert len(source) == NUM_GENERATED
    found = [
        measured(place, tmp_path / name, "--metric", "motion,psd", *more)
        for name, more in (("a", ()), ("b", ("--generated", tmp_path / "frames")))
    ]
    # The same clips in the same order: the interval too.
    assert found[0]["metrics"][0]["measurement"] == found[1]["metrics"][0]["measurement"]


def test_figures_without_a_network_need_no_weights(place: Path, tmp_path: Path) -> None:
    finished = call(
        engine.evaluate.main,
        *("--real", place / "real", "--generated", place / "samples.npz", "--metric", "motion"),
        *("--weights", tmp_path / "gone", "--cache", tmp_path, "--set", "resolution=16"),
        *("--set", "num_frames=4"),
    )
    assert finished.code == 0, finished.err


def test_the_page_holds_everything_itself(place: Path, tmp_path: Path) -> None:
    page = tmp_path / "page" / "found.html"
    measured(place, tmp_path, "--report", page)
    text = page.read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    (clips,) = re.findall(r'src="data:image/webp;base64,([^"]+)"', text)
    with Image.open(BytesIO(base64.b64decode(clips))) as image:
        assert getattr(image, "n_frames", 1) == 10
    assert "data:image/svg+xml" in text
    for shown in ("fid-k400", "network_sha256", "of 10", "stylegan-v, changed"):
        assert shown in text


def test_the_page_of_a_checkpoint_tells_of_its_training(
    place: Path, cascade_run: Path, tmp_path: Path
) -> None:
    page = tmp_path / "found.html"
    done = call(
        engine.evaluate.main,
        *("--real", place / "real", "--checkpoint", cascade_run, "--num", "4"),
        *("--metric", "motion", "--set", "num_frames=4", "--set", "num_videos=4"),
        *("--cache", tmp_path, "--clips", tmp_path / "clips", "--report", page),
    )
    assert done.code == 0, done.err
    text = page.read_text()
    assert 'id="curves"' in text
    assert "class_embedding_size: 4" in text
    assert torch.__version__ in text
    assert "stage 2 after 2 updates" in text


def test_classes_are_measured_by_themselves(place: Path, tmp_path: Path) -> None:
    """Folders a and b; a's generated videos are the real ones."""
    for number in range(12):
        kind, seed = ("a", 0) if number % 2 == 0 else ("c" if number > 8 else "b", 1)
        file = tmp_path / "generated" / kind / f"{number}.mp4"
        write_mp4(file, render_clip(number % 8, seed, number, 12, 32), 8)
    generated = ("--generated", tmp_path / "generated", "--set", "real_offset=first")
    tree = measured(place, tmp_path, *generated, "--per-class", "--metric", "fvd,precision,motion")
    assert [
        (each["class"], each["num_real"], each["num_generated"]) for each in tree["classes"]
    ] == [
        ("a", 10, 6),
        ("b", 10, 4),
    ]
    of_a, of_b = (each["metrics"] for each in tree["classes"])
    assert of_a["precision"]["value"] == 1
    # A class by itself is the same clips, in another order.
    folders = ("--real", place / "real" / "b", "--generated", tmp_path / "generated" / "b")
    alone = measured(place, tmp_path, *folders, "--set", "real_offset=first", "--metric", "fvd")
    value = alone["metrics"][0]["measurement"]["value"]
    assert of_b["fvd"]["value"] == pytest.approx(value, rel=1e-6)
    assert of_a["fvd"]["value"] != of_b["fvd"]["value"]
    lines = tree["printed"].splitlines()
    (line,) = (each for each in lines if each.startswith("a "))
    assert line.split()[:3] == ["a", "10", "6"]
    refused = evaluate(place, "--set", "resolution=16", "--per-class", "--metric", "motion")
    assert refused.code == 2
    assert "(real: a, b; generated: none)" in refused.err


MISTAKES = [
    (["--real", "{tmp}/gone"], "no videos at {tmp}/gone: no such folder"),
    (["--real", ""], "--real names nothing"),
    (["--generated", "{place}/real"], "--real and --generated are the same videos"),
    (["--protocol", "fvd"], "no protocol 'fvd'; there are paper, dvdgan"),
    (["--set", "frames=3"], "--set frames=3: there is no such key"),
    (["--metric", "fvd,fid"], "--metric 'fid' is none of fvd"),
    (["--batch", "0"], "--batch must be at least 1"),
    (["--resamples", "1"], "--resamples must be at least 2"),
    (["--out", "{tmp}/x.txt"], "--out {tmp}/x.txt: the name must end in .json"),
    (["--out", "/proc/nothing/x.json"], "cannot write /proc/nothing"),
    (["--report", "{tmp}"], "--report {tmp}: the name must end in .html"),
    (["--weights", "w"], "--weights are I3D's; with --network there are none"),
    (["--network", "{place}/samples.npz"], "{place}/samples.npz is no TorchScript file"),
    ([], "32x32; bring both sources to one size with --set resolution=PIXELS"),
    (["--set", "num_frames=13", "--set", "short=error"], "a clip of the protocol spans 13"),
    (["--set", "num_frames=13"], "0 of 10 videos can be used"),
    (["--cache", "{place}/network.pt"], "cannot write {place}/network.pt"),
]


@pytest.mark.parametrize(("options", "line"), MISTAKES, ids=lambda value: str(value)[:50])
def test_mistake_is_one_line_and_nothing_is_written(
    place: Path, tmp_path: Path, options: list[str], line: str
) -> None:
    given = [option.format(tmp=tmp_path, place=place) for option in options]
    if "--cache" in given:
        given += ["--set", "resolution=16"]
    if not any(option in given for option in ("--out",)):
        given += ["--out", str(tmp_path / "found.json")]
    finished = evaluate(place, *given)
    assert finished.code == 2
    last = finished.err.replace("\r", "\n").splitlines()[-1]
    assert last.startswith("error: ")
    assert line.format(tmp=tmp_path, place=place) in last.replace("16x16 pixels, ", "")
    assert "Traceback" not in finished.err
    assert list(tmp_path.iterdir()) == []


def test_without_weights_it_says_how_to_get_them(place: Path, tmp_path: Path) -> None:
    finished = call(
        engine.evaluate.main,
        *("--real", place / "real", "--generated", place / "samples.npz"),
        *("--weights", tmp_path / "gone.safetensors"),
    )
    assert "make them with `make i3d`" in finished.error


def test_clips_of_fewer_frames_than_i3d_takes(place: Path, i3d_weights: Path) -> None:
    finished = call(
        engine.evaluate.main,
        *("--real", place / "real", "--generated", place / "samples.npz"),
        *("--weights", i3d_weights, "--set", "num_frames=8"),
    )
    assert "clips have 8 frames, and the network needs 9" in finished.error


def test_a_full_disk_leaves_the_earlier_file(place: Path, tmp_path: Path) -> None:
    measured(place, tmp_path)  # features are there
    out = tmp_path / "found.json"
    out.write_text("earlier")
    with full_disk(6_000):  # enough for what is printed
        finished = evaluate(place, "--set", "resolution=16", "--out", out)
    assert finished.code == 2
    assert f"error: cannot write {out}: " in finished.err.splitlines()[-1]
    assert out.read_text() == "earlier"


def test_what_a_checkpoint_generates(cascade_run: Path, tiny: Any, tmp_path: Path) -> None:
    """Against real videos at the stride that it was trained with, at its size."""
    real = tmp_path / "real"
    for number in range(8):
        write_mp4(real / f"{number}.mp4", render_clip(number % 8, 0, number, 12, 32), 8)
    named = ("--real", real, "--checkpoint", cascade_run, "--clips", tmp_path / "clips")
    settings = ("--metric", "motion,psd", "--resamples", "10", "--set", "num_frames=4")
    places = ("--cache", tmp_path / "features", "--out", tmp_path / "found.json")

    finished = call(engine.evaluate.main, *named, *settings, *places, "--num", "6")
    assert finished.code == 0, finished.err
    found = json.loads((tmp_path / "found.json").read_text())
    stage = tiny.config().stages[2]
    assert found["protocol"]["resolution"] == stage.resolution == 16
    assert found["protocol"]["real_stride"] == stage.frame_stride
    assert found["generated"]["num_clips"] == 6
    assert len(list((tmp_path / "clips" / "clips").glob("*/*/000005.png"))) == 6  # unrolled
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "clips").rglob("*.png")}
    assert call(engine.evaluate.main, *named, *settings, *places, "--num", "6").code == 0
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    again = json.loads((tmp_path / "found.json").read_text())
    assert again["metrics"] == found["metrics"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--checkpoint", "nowhere"), "name either --generated or --checkpoint"),
        (("--num", "3"), "--num is for --checkpoint"),
        (("--clips", "x"), "--clips is for --checkpoint"),
    ],
    ids=str,
)
def test_what_belongs_to_a_checkpoint(place: Path, options: tuple[str, ...], message: str) -> None:
    finished = evaluate(place, *options)
    assert finished.code == 2
    assert message in finished.error


def test_a_checkpoint_that_is_none(place: Path, tmp_path: Path) -> None:
    arguments = ("--real", place / "real", "--checkpoint", tmp_path)
    finished = call(engine.evaluate.main, *arguments)
    assert finished.code == 2
    assert "no checkpoint under" in finished.error


# --- several ranks ---------------------------------------------------------------------------


def test_two_ranks_find_what_one_does(
    place: Path, cascade_run: Path, forks: Forks, tmp_path: Path
) -> None:
    """Of a checkpoint's videos, which they generate together; the second one says nothing."""
    network = ("--network", place / "network.pt", "--network-input", "uint8")
    metrics = ("--metric", "fvd,motion,coverage", "--resamples", "20", "--device", "cpu")
    settings = ("--set", "num_frames=4", "--set", "short=drop")
    found = []
    for name, num_ranks in (("one", 1), ("two", 2)):
        here = tmp_path / name
        outs = ("--out", here / "found.json", "--cache", here / "features", "--clips", here / "gen")
        source = ("--real", place / "real", "--checkpoint", cascade_run, "--num", "12")
        command = (*source, *network, *metrics, *settings, *outs)
        done = forks.script(num_ranks, "engine/evaluate.py", *command)
        assert done.code == 0, done.err
        assert done.out.count("fvd ") == 1
        tree = json.loads((here / "found.json").read_text())
        found.append({key: tree[key] for key in ("metrics", "generated", "real")})
        assert tree["generated"]["num_clips"] == 12
        assert tree["throughput"]["num_computed"] > 0
    for tree in found:
        tree["generated"].pop("path")
    assert found[0] == found[1]


def test_a_mistake_that_one_rank_finds_ends_both(place: Path, forks: Forks, tmp_path: Path) -> None:
    """With one line; the other neither waits nor repeats it."""
    network = ("--network", place / "samples.npz")
    source = ("--real", place / "real", "--generated", place / "samples.npz")
    done = forks.script(2, "engine/evaluate.py", *source, *network, "--cache", tmp_path)
    assert done.code == 2
    assert "samples.npz is no TorchScript file" in done.err
    assert done.err.count("error: ") == 1
    assert "Traceback" not in done.err
