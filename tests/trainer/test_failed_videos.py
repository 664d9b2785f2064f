"""Videos that break while a stage trains: replaced and told, and past a share the run is saved."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from forks import Forks
from small_runs import Tiny, contents, differences, logged

from engine.trainer.step import Trainer
from engine.video.index import VideoIndex

# The second where it is removed between the comparison with the index and the reading.
GONE = r"(cannot read .+?|cannot decode .+?: cannot be read): No such file or directory"
MANY = ("--set", "data.max_failed=0.5")


@pytest.fixture
def data(tiny: Tiny, cascade_run: Path, tmp_path: Path) -> Path:
    """A copy of the tiny data set, of eight videos; an iteration shows each of them once."""
    copy = tmp_path / "data"
    shutil.copytree(tiny.data, copy)
    return copy


def videos_of(data: Path) -> list[Path]:
    index = VideoIndex.load(data / "index.jsonl")
    return [index.path(number) for number in range(len(index.entries))]


def failed(out: Path, stage: int = 1) -> list[dict[str, Any]]:
    lines = (out / f"stage{stage}" / "failed-videos.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[Path]]:
    """Files that are removed before a step is done, by the steps done until then."""
    removed: dict[int, list[Path]] = {}
    train_step = Trainer.train_step

    def step(self: Trainer, *arguments: Any) -> dict[str, float]:
        for path in removed.get(self.step, []):
            path.unlink()
        return train_step(self, *arguments)

    monkeypatch.setattr(Trainer, "train_step", step)
    return removed


def test_a_video_that_breaks_is_replaced_counted_and_named(
    tiny: Tiny, data: Path, tmp_path: Path, breaking: dict[int, list[Path]]
) -> None:
    path = videos_of(data)[3]
    breaking[1] = [path]
    options = ("--data", data, "--max-steps", "5", *MANY)
    done = tiny.train(1, tmp_path / "out", *options)
    assert done.code == 0, done.err
    assert len(re.findall(f"note: {GONE}", done.out)) == 1
    replaced = [line["replaced_clips"] for line in logged(tmp_path / "out" / "stage1")]
    assert replaced[0] == 0
    assert replaced[-2:] == [1, 1]  # what was decoded ahead is used up
    (line,) = failed(tmp_path / "out")
    assert line["video"] == path.relative_to(data).as_posix()
    assert re.fullmatch(GONE, line["problem"])
    assert str(path) in line["problem"]
    assert line["step"] == 1 + replaced.index(1)


def test_a_run_goes_on_exactly_where_videos_are_broken(
    tiny: Tiny, data: Path, tmp_path: Path
) -> None:
    for path in videos_of(data)[2:4]:
        path.unlink()
    options = ("--data", data, *MANY)
    whole = tiny.trained(1, tmp_path / "whole", *options, "--max-steps", "4")
    for steps in ("2", "4"):
        parts = tiny.trained(1, tmp_path / "parts", *options, "--max-steps", steps)
    assert not differences(contents(whole), contents(parts))
    assert logged(tmp_path / "whole" / "stage1") == logged(tmp_path / "parts" / "stage1")
    # Found again after the resumption.
    assert {line["step"] for line in failed(tmp_path / "whole")} == {1}
    assert {line["step"] for line in failed(tmp_path / "parts")} == {1, 3}


def test_more_than_a_share_of_them_ends_the_run_saved(
    tiny: Tiny, data: Path, tmp_path: Path, breaking: dict[int, list[Path]]
) -> None:
    paths, out = videos_of(data), tmp_path / "out"
    kept = [(path, path.read_bytes(), path.stat()) for path in paths[:2]]
    breaking[1] = paths[:2]
    options = ("--data", data, "--set", "data.max_failed=0.2", "--max-steps", "6")
    error = tiny.train(1, out, *options).error
    assert re.search(f"2 of 8 videos have failed, e.g. {GONE}", error)
    assert "data.max_failed is 0.2" in error
    saved = sorted((out / "stage1" / "checkpoints").glob("step-*"))[-1]
    assert f"saved {saved}" in error
    assert 2 <= int(saved.name[-8:]) < 6
    assert len(failed(out)) == 2

    breaking.clear()
    error = tiny.train(1, out, *options).error  # they are not back yet
    assert "2 of 8 videos" in error
    data.joinpath("index.jsonl").touch()
    for path, content, status in kept:
        path.write_bytes(content)
        assert status.st_size == path.stat().st_size
    done = tiny.train(1, out, *options)
    assert done.code == 0, done.err
    assert logged(out / "stage1")[-1]["step"] == 6


def test_where_all_are_gone_the_run_is_saved(
    tiny: Tiny, data: Path, tmp_path: Path, breaking: dict[int, list[Path]]
) -> None:
    """As when a disk is unmounted; whatever share may fail."""
    breaking[1] = videos_of(data)
    out = tmp_path / "out"
    options = ("--data", data, "--set", "data.max_failed=1", "--max-steps", "9")
    error = tiny.train(1, out, *options).error
    assert re.search(f"none of 65 videos can be read, e.g. {GONE}", error)
    saved = sorted((out / "stage1" / "checkpoints").glob("step-*"))[-1]
    assert f"saved {saved}" in error
    # At the start there is nothing to save.
    error = tiny.train(1, out, *options).error
    assert "none of 65 videos can be read" in error
    assert sorted((out / "stage1" / "checkpoints").glob("step-*"))[-1] == saved


def test_ranks_agree_on_what_has_failed(
    tiny: Tiny, data: Path, tmp_path: Path, forks: Forks
) -> None:
    """A clip is one rank's, the count and the end are everyone's."""
    videos_of(data)[5].unlink()
    micro = ("--set", "training.micro_batch=2", "--data", data)
    fixed = (*micro, *MANY, "--max-steps", "2")
    done = forks.script(2, "engine/train.py", *tiny.options(1, tmp_path / "out", *fixed))
    assert done.code == 0, done.err
    assert [line["replaced_clips"] for line in logged(tmp_path / "out" / "stage1")] == [1, 1]
    assert len(failed(tmp_path / "out")) == 1

    options = tiny.options(1, tmp_path / "stopped", *micro, "--max-steps", "2")
    error = forks.script(2, "engine/train.py", *options).error
    assert "1 of 8 videos have failed" in error
    saved = tmp_path / "stopped/stage1/checkpoints/step-00000001"
    assert f"saved {saved}" in error
    assert {path.name for path in saved.glob("rank-*")} == {"rank-00000.pt", "rank-00001.pt"}


def test_a_rank_that_can_read_nothing_is_saved_with_the_others(
    tiny: Tiny, data: Path, tmp_path: Path, forks: Forks
) -> None:
    options = ("--set", "training.micro_batch=2", "--data", data, "--set", "data.max_failed=1")
    arguments = tiny.options(1, tmp_path / "out", *options, "--max-steps", "50")
    script = "tests/trainer/one_rank_loses_its_videos.py"
    error = forks.script(2, script, *arguments, FAILING_RANK=1).error
    (saved,) = (tmp_path / "out/stage1/checkpoints").glob("step-*")
    assert "none of 65 videos can be read, e.g. cannot read it: Stale file handle" in error
    assert f"saved {saved}" in error
    assert {path.name for path in saved.glob("rank-*")} == {"rank-00000.pt", "rank-00001.pt"}
