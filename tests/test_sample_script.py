"""sample.py: the same seed gives the same videos, and clips do not depend on each other."""

import json
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from checkpoint_files import forge_meta
from PIL import Image
from small_runs import Tiny, full_disk, sample

from engine.dummy_passes import DummyPasses
from engine.errors import UserError
from engine.sample_files import write
from engine.sampling import SamplePlan
from engine.trainer.checkpoints import find_checkpoint, open_checkpoint, read_tensors
from engine.trainer.fakes import LatentSource


def clips(out: Path) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = json.loads((out / "samples.json").read_text())["clips"]
    return listed


def sampled(checkpoint: Path, out: Path, *more: str | Path) -> list[str]:
    """Generate, which must succeed; each clip's hash, of the frames before encoding."""
    finished = sample("--checkpoint", checkpoint, "--out", out, *more)
    assert finished.code == 0, finished.err
    return [clip["sha256"] for clip in clips(out)]


def num_frames(video: Path) -> int:
    with av.open(str(video)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_the_same_seed_gives_the_same_files(cascade_run: Path, tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("a", "b", "other")]
    seeds = ("3", "3", "4")
    a, b, other = (
        sampled(cascade_run, out, "--seed", seed, "--num", "2")
        for out, seed in zip(runs, seeds, strict=True)
    )
    assert a == b
    assert not set(a) & set(other)
    names = sorted(path.name for path in runs[0].glob("*.mp4"))
    assert len(names) == 3  # two clips and the grid
    for name in [*names, "contact-sheet.png"]:
        contents = [(out / name).read_bytes() for out in runs]
        assert contents[0] == contents[1]
        assert contents[0] != contents[2]


def test_a_clip_does_not_depend_on_the_others(cascade_run: Path, tmp_path: Path) -> None:
    five = sampled(cascade_run, tmp_path / "five", "--num", "5")  # classes 0, 1, 0, 1, 0
    assert len(set(five)) == 5
    assert sampled(cascade_run, tmp_path / "two", "--num", "2") == five[:2]
    assert sampled(cascade_run, tmp_path / "one", "--classes", "1", "--num", "2") == [
        five[1],
        five[3],
    ]
    assert sampled(cascade_run, tmp_path / "swap", "--classes", "1,0") == [five[1], five[0]]


@pytest.mark.parametrize("frames", [1, 5, 6, 50])
def test_any_length(cascade_run: Path, tmp_path: Path, frames: int) -> None:
    """Stage 2 doubles stage 1's rate: odd lengths are cropped. 6 is what stage 1's clip gives."""
    out = tmp_path / "out"
    sampled(cascade_run, out, "--frames", str(frames), "--num", "1")
    videos = sorted(out.glob("*.mp4"))
    assert [num_frames(video) for video in videos] == [frames, frames]
    kept = read_tensors(out / "norm-statistics.pt")
    lengths = [{len(value) for value in stage.values()} for stage in kept["stages"]]
    of_stage_1 = -(-min(frames, 4 * 6) // 2)  # the passes are at most four training clips long
    assert lengths == [{of_stage_1}, {2 * of_stage_1}]


def test_default_length_is_the_unrolled_training_clip(cascade_run: Path, tmp_path: Path) -> None:
    sampled(cascade_run, tmp_path, "--num", "1")
    assert num_frames(tmp_path / "grid.mp4") == 6


def test_beyond_a_recurrent_stage_s_training_is_said(cascade_run: Path, tmp_path: Path) -> None:
    """Stage 1, a ConvGRU, trains on 3 frames, which unroll to 6."""
    for frames, notes in (("6", []), ("7", ["stage 1 is recurrent and was trained on 3 frames"])):
        out = tmp_path / frames
        finished = sample(
            "--checkpoint", cascade_run, "--out", out, "--frames", frames, "--num", "1"
        )
        assert finished.code == 0
        said = [line for line in finished.out.splitlines() if line.startswith("note: ")]
        assert [line.removeprefix("note: ").partition(";")[0] for line in said] == notes


def test_statistics_are_kept_and_used_again(cascade_run: Path, tmp_path: Path) -> None:
    first = sampled(cascade_run, tmp_path)
    file = tmp_path / "norm-statistics.pt"
    kept = read_tensors(file)
    assert sampled(cascade_run, tmp_path) == first
    # Other numbers in the file give other videos: it was read, not made again.
    for statistics in kept["stages"]:
        for value in statistics.values():
            value.mul_(3)
    torch.save(kept, file)
    assert sampled(cascade_run, tmp_path) != first
    # For another length, σ, seed or number of passes they are made anew.
    for option, value in (("--frames", "4"), ("--sigma", "0.5"), ("--passes", "1")):
        torch.save(kept, file)
        with_kept = sampled(cascade_run, tmp_path, option, value)
        assert with_kept == sampled(cascade_run, tmp_path / option, option, value)


def test_sigma_scales_z(cascade_run: Path, tmp_path: Path) -> None:
    """With a σ that rounds away all clips of a class are one; with σ = 1 they are not."""
    options = ("--classes", "0", "--num", "2")
    still = sampled(cascade_run, tmp_path / "still", *options, "--sigma", "1e-20")
    assert still[0] == still[1]
    moving = sampled(cascade_run, tmp_path / "moving", *options)
    assert moving[0] != moving[1]


def test_a_copied_stage_folder_is_all_that_is_needed(cascade_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "somewhere else" / "mine"
    shutil.copytree(cascade_run / "stage2", copy)
    there = sampled(cascade_run, tmp_path / "there")
    assert sampled(copy, tmp_path / "folder") == there
    assert sampled(copy / "checkpoints/step-00000002", tmp_path / "checkpoint") == there
    assert sampled(cascade_run / "stage1", tmp_path / "stage1") != there


def test_classes_by_name_and_number(tiny: Tiny, cascade_run: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in tiny.data.iterdir() if path.is_dir())
    by_name = sampled(cascade_run, tmp_path / "name", "--classes", f"{names[1]}, {names[0]}")
    assert sampled(cascade_run, tmp_path / "number", "--classes", "1,0") == by_name
    assert names[1].replace(" ", "-") in clips(tmp_path / "name")[0]["file"]


def with_meta(run: Path, copy: Path, changes: dict[str, Any]) -> Path:
    """A copy of the run's stage 2 whose meta.json has other entries."""
    shutil.copytree(run / "stage2", copy)
    for file in copy.glob("checkpoints/*/meta.json"):
        forge_meta(file.parent, lambda meta: meta.update(changes))
    return copy


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The classes that the passes for the norm statistics draw."""
    drawn: list[int] = []
    draw = LatentSource.labels

    def noted(source: LatentSource, batch_size: int) -> torch.Tensor | None:
        labels_B = draw(source, batch_size)
        assert labels_B is not None
        drawn.extend(labels_B.tolist())
        return labels_B

    monkeypatch.setattr(LatentSource, "labels", noted)
    return drawn


def test_classes_without_videos(tiny: Tiny, cascade_run: Path, tmp_path: Path) -> None:
    """On the data set that `cascade_run` has made, of two classes."""
    options = ("--data", tiny.data, "--set", "data.num_classes=4")
    checkpoint = tiny.trained(1, tmp_path, "--max-steps", "1", *options)
    assert open_checkpoint(checkpoint).class_counts == [4, 4, 0, 0]
    sampled(tmp_path, tmp_path / "all")
    assert json.loads((tmp_path / "all/samples.json").read_text())["labels"] == [0, 1]
    sampled(tmp_path, tmp_path / "asked", "--classes", "3,0")
    assert clips(tmp_path / "asked")[0]["file"] == "clip-000-class-3.mp4"


def test_the_passes_draw_classes_as_the_data_has_them(
    cascade_run: Path, tmp_path: Path, drawn: list[int]
) -> None:
    out = tmp_path / "out"
    for counts, share in (([1, 9], 0.9), ([0, 8], 1), ([9, 1], 0.1)):  # statistics made anew
        drawn.clear()
        copy = with_meta(cascade_run, tmp_path / f"{counts}", {"class_counts": counts})
        sampled(copy, out, "--batch", "100")
        assert len(drawn) == 400  # two passes for each of two stages
        # Five standard deviations of a binomial distribution.
        deviation = (share * (1 - share) / 400) ** 0.5
        assert sum(drawn) / 400 == pytest.approx(share, abs=5 * deviation)


def test_fp32_is_not_tf32(
    tiny: Tiny, cascade_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While training, freezing and sampling; cuDNN's convolutions would."""
    for run in (
        lambda: sampled(cascade_run, tmp_path / "samples"),
        lambda: tiny.trained(1, tmp_path / "run", "--max-steps", "1"),
    ):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
        run()
        assert not torch.backends.cudnn.allow_tf32


def test_unconditional(tiny: Tiny, cascade_run: Path, tmp_path: Path) -> None:
    """On the data set that `cascade_run` has made."""
    out = tmp_path / "run"
    options = ("--data", tiny.data, "--set", "data.num_classes=null")
    for stage in (1, 2):
        tiny.trained(stage, out, "--max-steps", "1", *options)
    hashes = sampled(out, tmp_path / "samples", "--num", "3")
    assert len(set(hashes)) == 3
    error = sample("--checkpoint", out, "--out", tmp_path / "x", "--classes", "1").error
    assert "--classes: this checkpoint was trained without classes" in error


def test_joint_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    """Holds every stage; no previous.pt, no earlier stage's run."""
    out = tmp_path / "run"
    tiny.trained(2, out, "--max-steps", "1", "--set", "stages.2.joint=true")
    assert not (out / "stage2/previous.pt").exists()
    assert len(set(sampled(out, tmp_path / "samples", "--frames", "7"))) == 2
    assert num_frames(tmp_path / "samples/grid.mp4") == 7


def test_averaged_weights_are_used(tiny: Tiny, cascade_run: Path, tmp_path: Path) -> None:
    """The same training with and without the average: the weights agree, the samples do not."""
    options = ("--max-steps", "2", "--set", "training.ema_decay=0.9")
    tiny.trained(1, tmp_path / "run", *options)
    averaged = sampled(tmp_path / "run", tmp_path / "averaged")
    assert averaged != sampled(cascade_run / "stage1", tmp_path / "plain")


MISTAKES = [
    ([], "the following arguments are required: --checkpoint, --out"),
    (["--out", "{out}", "--checkpoint", "{tmp}/x"], "no checkpoint at {tmp}/x: no such folder"),
    (["--out", "{out}", "--checkpoint", "{tmp}"], "no checkpoint under {tmp}"),
    (["--clips", "3"], "unrecognized arguments: --clips 3"),
    (["--frames", "0"], "--frames must be at least 1"),
    (["--frames", "many"], "argument --frames: invalid int value: 'many'"),
    (["--num", "-1"], "--num must be at least 1"),
    (["--passes", "0"], "--passes must be at least 1"),
    (["--sigma", "0"], "--sigma must be positive"),
    (["--sigma", "nan"], "--sigma must be positive"),
    (["--sigma", "inf"], "--sigma must be positive and finite"),
    (["--seed", "-1"], "--seed must be 0 to 2^63 - 1"),
    (["--format", "avi"], "argument --format: 'avi' is none of mp4, webp, gif, png, npz"),
    (["--format", ""], "argument --format: '' is none of mp4, webp, gif, png, npz"),
    (["--format", "mp4,,png"], "argument --format: '' is none of mp4, webp, gif, png, npz"),
    (["--format", "npz,mp4,npz"], "argument --format: npz is named twice"),
    (["--classes", "2"], "--classes: '2' is neither a class name nor 0 to 1"),
    (["--classes", "²"], "--classes: '²' is neither a class name nor 0 to 1"),
    (["--classes", "zebra"], "--classes: 'zebra' is neither a class name nor 0 to 1"),
    (["--classes", "0,,1"], "--classes: '' is neither a class name nor 0 to 1"),
    (["--classes", ""], "--classes: '' is neither a class name nor 0 to 1"),
]


@pytest.mark.parametrize(("options", "line"), MISTAKES, ids=lambda value: str(value)[:60])
def test_mistake_is_one_line_and_nothing_is_written(
    cascade_run: Path, tmp_path: Path, options: list[str], line: str
) -> None:
    names = {"tmp": tmp_path, "out": tmp_path / "out"}
    given = [option.format(**names) for option in options]
    if options and "--checkpoint" not in given:
        given += ["--checkpoint", str(cascade_run), "--out", str(tmp_path / "out")]
    assert line.format(**names) in sample(*given).error
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_told_before_the_passes(
    cascade_run: Path, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "below", Path("/proc/nothing")):
        finished = sample("--checkpoint", cascade_run, "--out", out)
        assert f"cannot write {out}" in finished.error  # a single line: no bar of passes
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    "name",
    ["samples.json", "norm-statistics.pt", "grid.mp4", "contact-sheet.png", "clip-001-{b}.mp4"],
)
def test_a_folder_where_a_file_goes_is_told_before_the_passes(
    tiny: Tiny, cascade_run: Path, tmp_path: Path, name: str
) -> None:
    _, b = sorted(path.name for path in tiny.data.iterdir() if path.is_dir())
    folder = tmp_path / name.format(b=b.replace(" ", "-"))
    folder.mkdir()
    finished = sample("--checkpoint", cascade_run, "--out", tmp_path)
    assert f"cannot write {folder}: it is a folder" in finished.error


def test_a_full_disk(cascade_run: Path, tmp_path: Path) -> None:
    """What could not be known before is one line too, and leaves what an earlier run made."""

    def left() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    sampled(cascade_run, tmp_path)
    before = left()
    for free_bytes in (2000, 500):  # too little for the grid, and for a clip
        with full_disk(free_bytes):
            finished = sample("--checkpoint", cascade_run, "--out", tmp_path)
        assert finished.code == 2
        assert "Traceback" not in finished.err
        assert "error: cannot write" in finished.err.splitlines()[-1]
        assert left() == before
    (tmp_path / "norm-statistics.pt").unlink()
    with full_disk(500):
        finished = sample("--checkpoint", cascade_run, "--out", tmp_path)
    assert "error: cannot write" in finished.err.splitlines()[-1]


def test_clips_are_written_as_they_come(cascade_run: Path, tmp_path: Path) -> None:
    """None is kept in memory, the 64 that the grid shows neither."""
    checkpoint = find_checkpoint(cascade_run)
    passes = DummyPasses(num_frames=2, num_passes=1, batch_size=1, sigma=1, seed=0)
    plan = SamplePlan(checkpoint, [0] * 70, 2, sigma=1, seed=0, passes=passes)
    videos: list[weakref.ref[torch.Tensor]] = []

    def one_by_one() -> Iterator[Iterator[torch.Tensor]]:
        for number in range(70):
            assert len(list(tmp_path.glob("*/clip-*.mp4"))) == number
            # Two are still in a loop's hands.
            assert sum(video() is not None for video in videos) <= 2
            video_TCHW = torch.full((2, 3, 16, 16), number, dtype=torch.uint8)
            videos.append(weakref.ref(video_TCHW))
            yield iter([video_TCHW])

    write(tmp_path, one_by_one(), plan)
    assert len(list(tmp_path.glob("clip-*.mp4"))) == 70
    with av.open(str(tmp_path / "grid.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.width == stream.height == 8 * (8 * (16 + 2) + 2)  # 8x8 clips, enlarged by 8
    with Image.open(tmp_path / "contact-sheet.png") as sheet:
        assert sheet.height == 64 * (96 + 2) + 2
    (tmp_path / "samples.json").unlink()
    (tmp_path / "samples.json").mkdir()
    with pytest.raises(UserError, match=f"cannot write {tmp_path}"):
        write(tmp_path, [[torch.zeros(2, 3, 16, 16, dtype=torch.uint8)]] * 70, plan)


def test_values_that_are_not_finite(cascade_run: Path, tmp_path: Path) -> None:
    """uint8 would make them black. An earlier run's videos stay."""
    before = sampled(cascade_run, tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir())
    finished = sample("--checkpoint", cascade_run, "--out", tmp_path, "--sigma", "1e300")
    assert finished.code == 2
    assert "not finite with sigma 1e+300; choose a smaller" in finished.err.splitlines()[-1]
    assert [clip["sha256"] for clip in clips(tmp_path)] == before
    assert sorted(path.name for path in tmp_path.iterdir()) == files


@pytest.mark.parametrize("foreign", [{"mean": torch.zeros(3)}, torch.zeros(3)], ids=["dict", "it"])
def test_a_foreign_file_of_statistics(cascade_run: Path, tmp_path: Path, foreign: Any) -> None:
    file = tmp_path / "norm-statistics.pt"
    torch.save(foreign, file)
    before = file.read_bytes()
    error = sample("--checkpoint", cascade_run, "--out", tmp_path).error
    assert f"{file} is not a file of sample.py's: move it, or use another --out" in error
    assert file.read_bytes() == before


def test_clips_of_an_earlier_run_are_not_mixed_in(cascade_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sampled(cascade_run, out, "--num", "4")
    listed = json.loads((out / "samples.json").read_text())
    mine, beyond = out / "clip-of-mine.mp4", tmp_path / "clip-x.mp4"
    for file in (mine, beyond):
        file.touch()
    listed["clips"].append({"file": "../clip-x.mp4"})
    (out / "samples.json").write_text(json.dumps(listed))

    sampled(cascade_run, out, "--num", "2")
    files = {clip["file"] for clip in clips(out)}
    assert {file.name for file in out.glob("*.mp4")} == {*files, "grid.mp4", mine.name}
    assert beyond.exists()
    (out / "samples.json").write_text("[]")  # somebody else's
    sampled(cascade_run, out, "--num", "2")


def test_stage_2_without_its_previous_stages(cascade_run: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "alone/checkpoints/step"
    shutil.copytree(cascade_run / "stage2/checkpoints/step-00000002", checkpoint)
    error = sample("--checkpoint", checkpoint, "--out", tmp_path / "out").error
    assert "the generator of stage 1 is not there; previous.pt belongs beside" in error
