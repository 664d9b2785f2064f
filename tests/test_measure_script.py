"""measure.py: its clips are sample.py's, its figures are of them, its mistakes are one line."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from small_runs import Finished, Tiny, call, full_disk, sample
from torch import Tensor

import engine.evaluation.report
import engine.measure
from engine import clip_figures
from engine.evaluation import classifier
from engine.evaluation.real_clips import LabelledClips
from engine.evaluation.report import spoilt
from engine.evaluation.spectra import frames_looked_at, spectra, spectral_distances
from engine.trainer.checkpoints import find_checkpoint
from engine.video.index import VideoIndex
from engine.video.writing import to_uint8

CONTROLS = [
    "first frame frozen",
    "frames shuffled",
    "frames repeated",
    "ends at rest",
    "one clip per class",
    "of another class",
]
"""Of clips of 16x16 pixels, which have no coarser ones."""


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classifiers that have learned nothing: what they can learn is tested elsewhere."""
    monkeypatch.setattr(classifier, "_NUM_STEPS", 2)


def measure(*arguments: str | Path) -> Finished:
    return call(engine.measure.main, *arguments)


def measured(checkpoint: Path, out: Path, *more: str | Path) -> dict[str, Any]:
    """Measure, which must succeed; what is in the JSON file."""
    finished = measure("--checkpoint", checkpoint, "--out", out, "--num", "2", *more)
    assert finished.code == 0, finished.err
    tree: dict[str, Any] = json.loads(out.read_text())
    return tree


def by_name(tree: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in tree["rows"]}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """The sets of clips that are measured: reference, generated, real, and the spoilt ones."""
    seen: list[tuple[Tensor, Tensor]] = []

    def noted(video: Tensor, labels: Tensor, **settings: Any) -> clip_figures.Figures:
        seen.append((video, labels))
        return clip_figures.measure(video, labels, **settings)

    monkeypatch.setattr(engine.evaluation.report, "measure", noted)
    return seen


@pytest.mark.parametrize("stage", ["stage1", "."])
def test_the_clips_are_those_that_sample_writes(
    cascade_run: Path, tmp_path: Path, seen: list[tuple[Tensor, Tensor]], stage: str
) -> None:
    """To the bit, of whichever stage, σ and seed; at the length of stage 1's clip, unrolled."""
    options = ("--sigma", "0.7", "--seed", "3", "--passes", "3", "--batch", "2")
    measured(cascade_run / stage, tmp_path / "figures.json", *options)
    finished = sample(
        *("--checkpoint", cascade_run / stage, "--out", tmp_path, "--num", "4", *options)
    )
    assert finished.code == 0, finished.err
    clips = json.loads((tmp_path / "samples.json").read_text())
    digests = [hashlib.sha256(to_uint8(clip).numpy().tobytes()).hexdigest() for clip in seen[1][0]]
    assert digests == [clip["sha256"] for clip in clips["clips"]]
    assert seen[1][1].tolist() == clips["labels"]


def test_averaged_weights_are_measured(
    tiny: Tiny, cascade_run: Path, tmp_path: Path, seen: list[tuple[Tensor, Tensor]]
) -> None:
    """The same training with and without the average: the weights agree, the clips do not."""
    tiny.trained(1, tmp_path / "run", "--max-steps", "2", "--set", "training.ema_decay=0.9")
    measured(tmp_path / "run", tmp_path / "averaged.json")
    measured(cascade_run / "stage1", tmp_path / "plain.json")
    assert not torch.equal(seen[1][0], seen[len(seen) // 2 + 1][0])


def test_the_file_holds_what_was_measured_and_of_what(
    tiny: Tiny, cascade_run: Path, tmp_path: Path, seen: list[tuple[Tensor, Tensor]]
) -> None:
    tree = measured(cascade_run, tmp_path / "figures.json", "--seed", "1")
    checkpoint = find_checkpoint(cascade_run)
    held_out = VideoIndex.load(tiny.data.with_name("data-held-out") / "index.jsonl")
    about = {
        "checkpoint": str(checkpoint.path),
        "stage": 2,
        "step": 2,
        "num_clips": 4,
        "classes": checkpoint.classes,
        "num_frames": 6,
        "frame_stride": 1,
        "resolution": 16,
        "period": 2,
        "seed": 1,
        "sigma": 1.0,
        "passes": 2,
        "batch": 8,
        "data_fingerprint": VideoIndex.load(tiny.data / "index.jsonl").fingerprint(),
        "held_out": str(held_out.root),
        "held_out_fingerprint": held_out.fingerprint(),
        "num_training_clips": 8,
        "note": None,
    }
    assert about.items() <= tree.items()
    assert list(by_name(tree)) == ["generated", "real against real", *CONTROLS]
    videos = dict(zip(["reference", *by_name(tree)], seen, strict=True))
    real = videos["real against real"][0]
    for name, (video, labels) in videos.items():
        row = by_name(tree).get(name, tree["reference"])
        assert row["motion"] == clip_figures.motion(video, 2)
        assert row["judder"] == clip_figures.judder(video, 2)
        assert row["persistence"] == clip_figures.persistence(video)
        assert row["variety"] == {str(k): v for k, v in clip_figures.variety(video, labels).items()}
        assert video.shape == real.shape
        if name != "reference":
            assert row["motion_ratio"] == row["motion"] / tree["reference"]["motion"]
    # The controls, by what they do to each clip.
    assert torch.equal(videos["first frame frozen"][0][:, 5], real[:, 0])
    assert torch.equal(videos["frames repeated"][0], real[:, [0, 0, 2, 2, 4, 4]])
    assert torch.equal(videos["one clip per class"][0], real[[0, 0, 2, 2]])
    shuffled = videos["frames shuffled"][0]
    assert not torch.equal(shuffled, real)
    for clip, original in zip(shuffled, real, strict=True):
        for frame in original:
            assert sum(torch.equal(frame, other) for other in clip) == 1


def test_the_controls_fail_their_figures(cascade_run: Path, tmp_path: Path) -> None:
    rows = by_name(measured(cascade_run, tmp_path / "figures.json"))
    real = rows["real against real"]
    assert rows["first frame frozen"]["motion_ratio"] == 0
    assert rows["first frame frozen"]["variety_ratio"] == 0
    assert rows["frames repeated"]["judder"] > 50 * real["judder"]
    assert rows["one clip per class"]["variety_ratio"] == pytest.approx(0, abs=1e-5)
    assert rows["frames shuffled"]["persistence"] < 0.8 * real["persistence"]


def test_controls_that_these_clips_are_too_small_for() -> None:
    """On clips of eight frames and 32 pixels, of two classes that differ in brightness."""
    torch.manual_seed(0)
    video = torch.rand(4, 9, 3, 32, 32)
    labels = torch.tensor([3, 5, 3, 5])
    found = dict(spoilt(LabelledClips(video, labels), 2, 0))
    assert list(found) == [*CONTROLS[:-1], "16x16 pixels", "of another class"]
    rest = found["ends at rest"].video_BTCHW
    assert torch.equal(rest[:, 2:7], video[:, 2:7])
    found_ends = clip_figures.ends(rest)
    assert found_ends is not None
    assert max(found_ends) < 0.01
    coarse = found["16x16 pixels"].video_BTCHW
    torch.testing.assert_close(coarse[:, :, :, ::2, 1::2], coarse[:, :, :, 1::2, ::2])
    torch.testing.assert_close(coarse.mean(), video.mean())
    frames = frames_looked_at(9)
    real_KR = spectra(video, frames)
    assert min(spectral_distances(spectra(coarse, frames), real_KR)) > 0.3
    other = found["of another class"]
    assert torch.equal(other.video_BTCHW, video)
    assert other.labels_B is not None
    assert other.labels_B.tolist() == [5, 3, 5, 3]


def test_the_table_is_what_the_file_holds(cascade_run: Path) -> None:
    finished = measure("--checkpoint", cascade_run, "--num", "2")
    assert finished.code == 0
    lines = finished.out.splitlines()
    (title,) = (number for number, line in enumerate(lines) if line.startswith("Stage 2 at step 2"))
    assert "4 clips of 16x16/6, sigma 1, norm statistics fixed by 2 passes" in lines[title]
    names = [line.strip().split("  ")[0] for line in lines[title + 2 : title + 10]]
    assert names == ["generated", "real against real", *CONTROLS]
    frozen = lines[title + 4].split()
    # Motion; ends are not defined for clips this short; judder; persistence; PSD.
    assert frozen[3:7] == ["0.00", "-", "1.00", "1.00"]
    assert float(frozen[7]) > 0
    # Classes; variety, and the least of it.
    assert frozen[8:] == ["0.50", "0.50", "0.00", "(0.00)"]


def test_the_picture_shows_real_clips_above_generated_ones(
    cascade_run: Path, seen: list[tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    picture = tmp_path / "new" / "clips.webp"
    finished = measure("--checkpoint", cascade_run, "--picture", picture)
    assert finished.code == 0, finished.err
    assert f"wrote: {picture}" in finished.out
    real, generated = (video for video, _ in seen[:2])
    with Image.open(picture) as image:
        num_frames = sum(1 for _ in ImageSequence.Iterator(image))
        assert num_frames == generated.shape[1] == 6
        image.seek(0)
        # The first clips are one of each class. WebP is lossy, and a clip is a cell of 64 pixels.
        pixels = np.asarray(image.convert("RGB"))[:, -(2 * 66 + 2) :].astype(float)
    shown = [pixels[2 + 66 * row :][:64, 2:66].mean(axis=(0, 1)) for row in range(4)]
    for video, row in ((real, 0), (generated, 2)):
        expected = (video[0, 0].mean(dim=(1, 2)) + 1) * 127.5
        assert np.abs(shown[row] - expected.numpy()).max() < 8


def test_the_same_options_give_the_same_file(cascade_run: Path, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.json", "b.json", "other.json")]
    for file, seed in zip(files, ("3", "3", "4"), strict=True):
        measured(cascade_run, file, "--seed", seed)
    a, b, other = (file.read_bytes() for file in files)
    assert a == b
    assert a != other
    assert not list(tmp_path.glob("*.partial"))


def test_a_stage_1_of_three_frames_has_none_to_repeat_and_no_ends(
    cascade_run: Path, tmp_path: Path
) -> None:
    tree = measured(cascade_run / "stage1", tmp_path / "figures.json")
    assert (tree["stage"], tree["num_frames"], tree["frame_stride"], tree["period"]) == (1, 3, 2, 1)
    assert list(by_name(tree))[2:] == [
        name for name in CONTROLS if name not in ("frames repeated", "ends at rest")
    ]


def test_other_data_has_no_held_out_clips_unless_they_are_named(
    tiny: Tiny, cascade_run: Path, tmp_path: Path
) -> None:
    """The sample set itself, named as a folder: four clips of a class are too few to divide."""
    unnamed = measured(cascade_run, tmp_path / "b.json")  # makes the held-out clips
    options = ("--checkpoint", cascade_run, "--data", tiny.data)
    line = f"too few videos in {tiny.data} to compare with: 8 of a class, of 6 frames or more"
    assert line in measure(*options).error
    beside = tiny.data.with_name("data-held-out")
    line = f"--held-out {tiny.data} holds the videos that were trained on"
    assert line in measure("--checkpoint", cascade_run, "--held-out", tiny.data).error
    named = measured(cascade_run, tmp_path / "a.json", "--data", tiny.data, "--held-out", beside)
    assert named["rows"] == unnamed["rows"]


def test_without_classes(tiny: Tiny, cascade_run: Path, tmp_path: Path) -> None:
    """On the data set that `cascade_run` has made."""
    options = ("--data", tiny.data, "--set", "data.num_classes=null")
    tiny.trained(1, tmp_path / "run", "--max-steps", "1", *options)
    file = tmp_path / "figures.json"
    finished = measure("--checkpoint", tmp_path / "run", "--out", file)
    assert finished.code == 0, finished.err
    tree = json.loads(file.read_text())
    assert [row["recognised"] for row in tree["rows"]] == [{}] * 5
    assert by_name(tree)["generated"]["num_clips"] == 64
    assert by_name(tree)["real against real"]["num_clips"] == 2  # of eight videos
    assert by_name(tree)["one clip per class"]["variety_ratio"] == pytest.approx(0, abs=1e-5)
    assert "note: the real clips are of the training data itself" in finished.out
    assert "by colour" not in finished.out


MISTAKES = [
    ([], "the following arguments are required: --checkpoint"),
    (["--checkpoint", "{tmp}/x"], "no checkpoint at {tmp}/x: no such folder"),
    (["--checkpoint", "{tmp}"], "no checkpoint under {tmp}"),
    (["--frames", "3"], "unrecognized arguments: --frames 3"),
    (["--num", "1"], "--num must be at least 2"),
    (["--passes", "0"], "--passes must be at least 1"),
    (["--batch", "0"], "--batch must be at least 1"),
    (["--sigma", "0"], "--sigma must be positive and finite"),
    (["--sigma", "inf"], "--sigma must be positive and finite"),
    (["--picture", "clips.png"], "--picture clips.png: the name must end in .webp"),
    (["--seed", "-1"], "--seed must be 0 to 2^63 - 1"),
    (["--data", ""], "--data names nothing"),
    (["--held-out", ""], "--held-out names nothing"),
    (["--data", "{tmp}/gone"], "no data at {tmp}/gone: neither an index nor a folder"),
    (["--held-out", "{tmp}/gone"], "no data at {tmp}/gone: neither an index nor a folder"),
]


@pytest.mark.parametrize(("options", "line"), MISTAKES, ids=lambda value: str(value)[:60])
def test_mistake_is_one_line_and_nothing_is_written(
    cascade_run: Path, tmp_path: Path, options: list[str], line: str
) -> None:
    given = [option.format(tmp=tmp_path) for option in options]
    if options and "--checkpoint" not in given:
        given += ["--checkpoint", str(cascade_run)]
    given += ["--out", str(tmp_path / "figures.json")]
    assert line.format(tmp=tmp_path) in measure(*given).error
    assert not (tmp_path / "figures.json").exists()


def test_a_place_that_cannot_be_written_is_told_before_the_passes(
    cascade_run: Path, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for out, named in (
        (file / "below.json", file),
        (Path("/proc/nothing/figures.json"), Path("/proc/nothing")),
        (tmp_path, tmp_path),
    ):
        error = measure("--checkpoint", cascade_run, "--out", out).error
        assert f"cannot write {named}: " in error
    assert file.read_text() == "mine"


def test_a_full_disk_leaves_the_earlier_file(cascade_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    out.write_text("earlier")
    with full_disk(3_000):  # enough for what is printed
        finished = measure("--checkpoint", cascade_run, "--out", out, "--num", "2")
    assert finished.code == 2
    assert f"error: cannot write {out}: " in finished.err.splitlines()[-1]
    assert out.read_text() == "earlier"


def test_values_that_are_not_finite(cascade_run: Path, tmp_path: Path) -> None:
    finished = measure("--checkpoint", cascade_run, "--num", "2", "--sigma", "1e300")
    assert finished.code == 2
    assert "not finite with sigma 1e+300" in finished.err.splitlines()[-1]
