import subprocess
import sys
from pathlib import Path

import pytest
from numbered_videos import write_numbered

from engine.video.index import VideoIndex

REPOSITORY = Path(__file__).parents[2]


def prepare(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "engine" / "prepare.py"), *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"},
    )


def test_index_of_class_folders(tmp_path: Path) -> None:
    write_numbered(tmp_path / "v" / "a dog", "mjpeg", num_frames=25)
    write_numbered(tmp_path / "v" / "b", "h264", num_frames=50)
    (tmp_path / "v" / "b" / "x.mp4").write_text("x")
    out = tmp_path / "indexes" / "v.jsonl"
    done = prepare(tmp_path / "v", "--out", out, "--workers", "2")
    assert done.returncode == 0, done.stderr
    for line in (
        "accepted  2 videos, 0.00 hours, 25 to 50 frames",
        "classes   2",
        "rejected  1, listed in",
        "1  not a video (no mp4, mov, matroska, webm or avi header)  (e.g. b/x.mp4)",
        f"index     {out}",
    ):
        assert line in done.stdout
    assert "100%" in done.stderr  # the progress bar
    assert len(VideoIndex.load(out).entries) == 2


def test_ucf101_as_unpacked_in_two_downloads(tmp_path: Path) -> None:
    """The level above is refused; a part of the classes has the whole data set's labels."""
    lists = tmp_path / "ucf" / "ucfTrainTestlist"
    write_numbered(tmp_path / "ucf" / "UCF-101" / "YoYo", "mjpeg", num_frames=25)
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 Archery\n2 YoYo\n")
    (lists / "trainlist01.txt").write_text("YoYo/mjpeg.avi 2\n")
    out = tmp_path / "ucf.jsonl"
    refused = prepare(tmp_path / "ucf", "--out", out, "--workers", "1")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert f"give {tmp_path / 'ucf' / 'UCF-101'}," in refused.stderr
    right = (tmp_path / "ucf" / "UCF-101", "--out", out, "--workers", "1")
    for option in (
        ("--annotations", lists / "trainlist01.txt"),
        ("--classes", lists / "classInd.txt"),
    ):
        done = prepare(*right, *option)
        assert done.returncode == 0, done.stderr
        assert "warning   1 classes have no usable video, e.g. Archery" in done.stdout
        index = VideoIndex.load(out)
        assert (index.classes, index.entries[0].label) == (("Archery", "YoYo"), 1)
    (lists / "classInd.txt").unlink()
    done = prepare(*right, "--annotations", lists / "trainlist01.txt")
    assert done.stdout.startswith("note: no classInd.txt beside")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing", "--out", "i.jsonl"], "missing is not a folder of videos"),
        (["empty", "--out", "i.jsonl"], "empty is empty"),
        (["bad", "--out", "i.jsonl"], "no usable video in"),
        (["bad", "--out", "empty"], "--out names the index file"),
        (["bad", "--out", "i.jsonl", "--annotations", "no.csv"], "cannot read the annotations"),
        (["bad", "--out", "i.jsonl", "--classes", "no.txt"], "cannot read the class list"),
        (["bad"], "required: --out"),
        (["bad", "--out", "i.jsonl", "--workers", "0"], "must be at least 1"),
        (["bad", "--out", "i.jsonl", "--worker", "1"], "unrecognized arguments: --worker"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.mp4").write_text("x")
    paths = [a if a.startswith("--") or a.isdigit() else str(tmp_path / a) for a in arguments]
    done = prepare(*paths)
    assert done.returncode == 2
    assert done.stdout == ""
    progress, _, error = done.stderr.rpartition("error: ")
    assert not progress.strip() or progress.strip().startswith("decoding: ")
    assert message in error
    assert error.endswith("\n")
    assert error.count("\n") == 1


def test_help_explains_the_layouts() -> None:
    done = prepare("--help")
    assert done.returncode == 0
    for word in ("class folders", "BDD100K", "--annotations", "--classes", "example:"):
        assert word in done.stdout
