"""sample.py --format: what is written is what was generated, and an earlier run's files go."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from small_runs import full_disk, sample

from engine import sample_files
from engine.dummy_passes import DummyPasses
from engine.errors import UserError
from engine.sample import parse
from engine.sample_files import make_writable, write
from engine.sampling import SamplePlan
from engine.trainer.checkpoints import find_checkpoint

PASSES = DummyPasses(num_frames=2, num_passes=1, batch_size=1, sigma=1, seed=0)
ALWAYS = {"grid.mp4", "contact-sheet.png", "samples.json", "norm-statistics.pt"}


def sampled(checkpoint: Path, out: Path, formats: str | None, num: int = 3) -> dict[str, Any]:
    """What samples.json then holds."""
    options = [] if formats is None else ["--format", formats]
    finished = sample("--checkpoint", checkpoint, "--out", out, "--num", str(num), *options)
    assert finished.code == 0, finished.err
    listed: dict[str, Any] = json.loads((out / "samples.json").read_text())
    return listed


def left(out: Path) -> set[str]:
    return {path.name for path in out.iterdir()}


def read_frames(folder: Path) -> NDArray[np.uint8]:
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.iterdir())])


def hashes(videos: NDArray[np.uint8]) -> list[str]:
    """As samples.json has them, of frames [T, C, H, W]."""
    channels_first = videos.transpose(0, 1, 4, 2, 3)
    return [hashlib.sha256(np.ascontiguousarray(v).tobytes()).hexdigest() for v in channels_first]


@pytest.fixture
def plan(cascade_run: Path) -> SamplePlan:
    checkpoint = find_checkpoint(cascade_run)
    return SamplePlan(checkpoint, [1, 0, 1], 2, sigma=1, seed=0, passes=PASSES)


def test_every_format_is_of_the_same_clips(cascade_run: Path, tmp_path: Path) -> None:
    default, every = tmp_path / "default", tmp_path / "every"
    of_default = sampled(cascade_run, default, None)
    files = [clip["file"] for clip in of_default["clips"]]
    assert of_default["formats"] == ["mp4"]
    assert all(clip.keys() == {"file", "sha256"} for clip in of_default["clips"])
    assert left(default) == {*files, *ALWAYS}

    of_every = sampled(cascade_run, every, "npz, mp4,png")
    assert of_every["formats"] == ["mp4", "png", "npz"]
    assert left(every) == {*files, *ALWAYS, "frames", "samples.npz"}
    for name in (*files, "grid.mp4", "contact-sheet.png"):
        assert (every / name).read_bytes() == (default / name).read_bytes()
    generated = [clip["sha256"] for clip in of_default["clips"]]  # before anything was encoded
    folders = [clip["folder"] for clip in of_every["clips"]]
    assert folders == [f"frames/{file.removesuffix('.mp4')}" for file in files]
    assert {path.name for path in (every / "frames").iterdir()} == {Path(f).name for f in folders}
    assert hashes(np.stack([read_frames(every / folder) for folder in folders])) == generated
    with np.load(every / "samples.npz", allow_pickle=False) as archive:
        assert hashes(archive["videos"]) == generated
        assert archive["videos"].shape == (3, 6, 16, 16, 3)  # as generated, and not enlarged
        assert (archive["labels"].dtype, archive["labels"].tolist()) == (np.int64, [0, 1, 0])
        assert archive["fps"] == of_every["frames_per_second"]


def test_what_is_written_is_what_is_given(plan: SamplePlan, tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    videos = torch.randint(0, 256, (3, 5, 3, 16, 16), dtype=torch.uint8, generator=random)
    plan = dataclasses.replace(plan, num_frames=5)
    in_chunks = (iter(video.split([1, 3, 1])) for video in videos)
    write(tmp_path, in_chunks, plan, ("png", "npz"))
    expected = videos.permute(0, 1, 3, 4, 2).numpy()
    folders = sorted((tmp_path / "frames").iterdir())
    assert np.array_equal([read_frames(folder) for folder in folders], expected)
    with np.load(tmp_path / "samples.npz") as archive:
        assert np.array_equal(archive["videos"], expected)
        assert archive["labels"].tolist() == [1, 0, 1]
    assert not list(tmp_path.glob("clip-*.mp4"))


def test_without_classes_there_are_no_labels(plan: SamplePlan, tmp_path: Path) -> None:
    without = SamplePlan(plan.checkpoint, [None], 2, sigma=1, seed=0, passes=PASSES)
    write(tmp_path, [[torch.zeros(2, 3, 16, 16, dtype=torch.uint8)]], without, ["npz"])
    with np.load(tmp_path / "samples.npz") as archive:
        assert sorted(archive) == ["fps", "videos"]


def test_clips_are_written_as_they_come(plan: SamplePlan, tmp_path: Path) -> None:
    def one_by_one() -> Iterator[list[torch.Tensor]]:
        for number in range(3):
            (aside,) = tmp_path.iterdir()
            assert len(list(aside.glob("frames/clip-*"))) == number
            assert (aside / "samples.npz").stat().st_size >= number * 3 * 128 * 128 * 2
            yield [torch.full((2, 3, 128, 128), number, dtype=torch.uint8)]

    write(tmp_path, one_by_one(), plan, ("png", "npz"))


def test_an_earlier_run_s_files_go(cascade_run: Path, tmp_path: Path) -> None:
    for formats, num in (("mp4,png,npz", 3), ("png", 2), ("png,npz", 3), ("npz", 1), ("mp4", 2)):
        listed = sampled(cascade_run, tmp_path, formats, num)
        mp4s = {clip["file"] for clip in listed["clips"] if "file" in clip}
        others = {"png": "frames", "npz": "samples.npz"}
        others_left = {name for key, name in others.items() if key in formats}
        assert left(tmp_path) == {*ALWAYS, *mp4s, *others_left}
        assert len(mp4s) == num * ("mp4" in formats)
        if "png" in formats:
            assert len(list((tmp_path / "frames").iterdir())) == num


@pytest.mark.parametrize("mine", ["frames", "frames/mine.png", "frames/clip-000-a/mine.png"])
@pytest.mark.parametrize("formats", ["png", "mp4"])
def test_frames_that_are_somebody_s_are_told_before_the_passes(
    cascade_run: Path, tmp_path: Path, mine: str, formats: str
) -> None:
    """Both where frames would be written and where an earlier run's would be removed."""
    earlier = {"formats": ["png"], "clips": []}
    (tmp_path / "samples.json").write_text(json.dumps(earlier))
    file = tmp_path / mine
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("mine")
    finished = sample("--checkpoint", cascade_run, "--out", tmp_path, "--format", formats)
    assert f"{file} is not sample.py's: move it, or use another --out" in finished.error
    assert file.read_text() == "mine"
    assert json.loads((tmp_path / "samples.json").read_text()) == earlier


def test_frames_elsewhere_are_not_followed(plan: SamplePlan, tmp_path: Path) -> None:
    """A link is told too: a folder would take its place, and its frames be left behind."""
    (tmp_path / "elsewhere").mkdir()
    out = tmp_path / "out"
    out.mkdir()
    (out / "frames").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"frames is not sample\.py's"):
        make_writable(out, plan, ["png"])
    make_writable(out, plan, ["mp4", "npz"])  # neither read nor written
    (out / "samples.npz").mkdir()
    with pytest.raises(UserError, match=r"samples\.npz: it is a folder"):
        make_writable(out, plan, ["npz"])


@pytest.mark.parametrize("formats", ["png", "npz"])
def test_a_full_disk(plan: SamplePlan, tmp_path: Path, formats: str) -> None:
    """The earlier run's files stay, and nothing is left aside."""
    videos = torch.zeros(3, 2, 3, 16, 16, dtype=torch.uint8)
    write(tmp_path, [[video] for video in videos], plan, [formats])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.[np]*") if path.is_file()}
    assert len(before) == {"png": 3 * 2 + 1, "npz": 2}[formats]  # with the contact sheet
    random = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, videos.shape, dtype=torch.uint8, generator=random)
    with full_disk(500), pytest.raises(UserError, match="cannot write"):
        write(tmp_path, [[video] for video in noise], plan, [formats])
    assert {path: path.read_bytes() for path in before} == before
    assert not list(tmp_path.glob(".writing-*"))


def test_an_archive_that_is_somebody_s_is_told_before_the_passes(
    plan: SamplePlan, tmp_path: Path
) -> None:
    (tmp_path / "samples.npz").write_text("mine")
    with pytest.raises(UserError, match=r"samples\.npz is not sample\.py's"):
        make_writable(tmp_path, plan, ["npz"])
    make_writable(tmp_path, plan, ["mp4"])
    assert (tmp_path / "samples.npz").read_text() == "mine"


def test_what_a_killed_run_left_goes(plan: SamplePlan, tmp_path: Path) -> None:
    (tmp_path / ".writing-xyz").mkdir()
    (tmp_path / ".writing-xyz" / "clip.mp4").write_text("half")
    make_writable(tmp_path, plan)
    assert left(tmp_path) == set()


@pytest.mark.parametrize(("num", "first"), [(3, "clip-000-"), (1001, "clip-0000-")])
def test_sorted_names_are_in_the_clips_order(num: int, first: str, plan: SamplePlan) -> None:
    names = sample_files._clip_names(dataclasses.replace(plan, labels=[0] * num))
    assert names[0].startswith(first)
    assert names == sorted(names)


def test_the_option() -> None:
    needed = ["--checkpoint", "runs/x", "--out", "samples"]
    assert parse(needed).format == ("mp4",)
    assert parse([*needed, "--format", "png , mp4"]).format == ("mp4", "png")
