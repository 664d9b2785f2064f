"""Labels mean the same classes in all stages of a run, and in every part of one stage."""

import json
import shutil
from pathlib import Path

import pytest
from checkpoint_files import FACTS
from small_runs import Tiny, contents, differences

from engine.errors import UserError
from engine.trainer.checkpoint_meta import file_names, meta_text, read_meta
from engine.trainer.checkpoints import Checkpoint
from engine.trainer.previous import check_same_classes
from engine.video.index import VideoIndex


def of_classes(*names: str) -> Checkpoint:
    facts = FACTS.model_copy(update={"classes": list(names)})
    files = dict.fromkeys(file_names(1), (0, "0" * 64))
    return Checkpoint(Path("runs/x/stage1"), read_meta(meta_text(1, facts, files), "x"))


def test_equal_lists_pass() -> None:
    check_same_classes(("archery", "bowling"), "data", of_classes("archery", "bowling"))
    check_same_classes((), "data", of_classes())


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("archery", "bowling"), "class 0 is 'archery' in data, 'bowling' in runs/x/stage1: "),
        (("bowling", "archery"), "class 1 is 'archery' in data, 'diving' in runs/x/stage1: "),
        (("bowling",), "class 1 is not there in data, 'diving' in runs/x/stage1: "),
        (
            ("bowling", "diving", "zumba"),
            "class 2 is 'zumba' in data, not there in runs/x/stage1: ",
        ),
    ],
)
def test_the_first_difference_is_named(classes: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_same_classes(classes, "data", of_classes("bowling", "diving"))


@pytest.fixture
def other_classes(tiny: Tiny, cascade_run: Path, tmp_path: Path) -> Path:
    """An index of the same videos that calls class 0 archery; `cascade_run` has made the videos."""
    index = VideoIndex.load(tiny.data / "index.jsonl")
    other = VideoIndex(index.root, ("archery", *index.classes[1:]), index.entries)
    other.save(tmp_path / "other.jsonl")
    return tmp_path / "other.jsonl"


@pytest.mark.parametrize("named", [False, True], ids=["default", "--previous"])
def test_stage_2_refuses_other_classes_than_stage_1s(
    tiny: Tiny, cascade_run: Path, other_classes: Path, tmp_path: Path, named: bool
) -> None:
    out = tmp_path / "out"
    options = ["--data", str(other_classes), "--max-steps", "1"]
    if named:
        options += ["--previous", str(cascade_run)]
    else:
        shutil.copytree(cascade_run / "stage1", out / "stage1")
    finished = tiny.train(2, out, *options)
    was = VideoIndex.load(tiny.data / "index.jsonl").classes[0]
    stage1 = (cascade_run if named else out) / "stage1/checkpoints/step-00000002"
    assert f"class 0 is 'archery' in {other_classes}, {was!r} in {stage1}: " in finished.error
    assert not (out / "stage2/previous.pt").exists()  # no pass of stage 1 was made
    assert not (out / "stage2/checkpoints").exists()


def test_a_run_is_not_resumed_with_other_classes(
    tiny: Tiny, cascade_run: Path, other_classes: Path, tmp_path: Path
) -> None:
    shutil.copytree(cascade_run / "stage1", tmp_path / "stage1")
    newest = tmp_path / "stage1/checkpoints/step-00000002"
    before = contents(newest)
    finished = tiny.train(1, tmp_path, "--data", other_classes, "--max-steps", "3")
    assert f"class 0 is 'archery' in {other_classes}" in finished.error
    assert differences(before, contents(newest)) == []


def test_a_checkpoint_keeps_its_classes(tiny: Tiny, cascade_run: Path) -> None:
    meta = cascade_run / "stage1/checkpoints/step-00000002/meta.json"
    names = json.loads(meta.read_text())["classes"]
    assert names == list(VideoIndex.load(tiny.data / "index.jsonl").classes)


def test_fewer_classes_than_configured_are_said_before_training(
    tiny: Tiny, cascade_run: Path, tmp_path: Path
) -> None:
    options = ("--data", tiny.data, "--set", "data.num_classes=5", "--max-steps", "1")
    finished = tiny.train(1, tmp_path, *options)
    assert finished.code == 0, finished.err
    lines = finished.out.splitlines()
    note = (
        "note: the data set has 2 classes, data.num_classes is 5; classes without videos are not "
        "trained"
    )
    assert note in lines
    assert lines.index(note) < min(n for n, line in enumerate(lines) if "loss_D" in line)
    whole = tiny.train(1, tmp_path / "whole", "--data", tiny.data, "--max-steps", "1")
    assert "not trained" not in whole.out
