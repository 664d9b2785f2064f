"""prepare.py --transcode as it is called: killed and started again, and what it refuses."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from numbered_videos import decode_all, read_number, write_numbered

from engine.command_line import REPOSITORY
from engine.errors import UserError
from engine.prepare import main
from engine.video.index import VideoIndex

NUM_VIDEOS, NUM_FRAMES = 8, 120


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def num_lines(path: Path) -> int:
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def test_a_run_that_is_killed_goes_on(tmp_path: Path) -> None:
    root, small = tmp_path / "v", tmp_path / "small"
    for number in range(NUM_VIDEOS):
        write_numbered(root / f"{number:02d}", "mjpeg", num_frames=NUM_FRAMES)
    out, journal = small / "index.jsonl", small / ".copies.jsonl"
    command = [sys.executable, str(REPOSITORY / "engine" / "prepare.py"), str(root)]
    command += ["--transcode", str(small), "--size", "32", "--out", str(out), "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment) as killed:
        deadline = time.monotonic() + 60
        while num_lines(journal) < 3 and time.monotonic() < deadline:  # a header, two copies
            time.sleep(0.002)
        workers = children(killed.pid)
        killed.kill()
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    num_copied = num_lines(journal) - 1
    assert 2 <= num_copied < NUM_VIDEOS
    assert workers
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(is_running, workers))  # nobody would end them

    whole = {path: path.stat().st_mtime_ns for path in small.glob("*/*.mkv")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    num_there = int(done.stdout.partition(" were there already")[0].split()[-1])
    assert done.stdout.startswith(f"copied    {NUM_VIDEOS - num_there} videos, {num_there} were")
    # One may have been in place and not listed yet.
    assert num_copied <= len(whole) <= num_copied + 1
    assert num_there == num_copied
    assert sum(path.stat().st_mtime_ns == then for path, then in whole.items()) == num_there
    for line in (
        f"accepted  {NUM_VIDEOS} videos, 0.01 hours, 120 to 120 frames",
        f"index     {out}",
        f"copies    {small}, ",
    ):
        assert line in done.stdout
    assert "copying: " in done.stderr  # the progress bar
    index = VideoIndex.load(out)
    assert len(index.entries) == NUM_VIDEOS
    for number in range(NUM_VIDEOS):
        numbers = [read_number(frame) for frame in decode_all(index.path(number))]
        assert numbers == list(range(NUM_FRAMES))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--transcode", "small"], "--transcode needs --size, the resolution of the last stage"),
        (["--transcode", "small", "--size", "0"], "--size 0: must be at least 1"),
        (["--transcode", "small", "--size", "x"], "argument --size: invalid int value: 'x'"),
        (["--size", "64"], "--size is the copies': it needs --transcode FOLDER"),
        (["--codec", "vp9"], "--codec is the copies': it needs --transcode FOLDER"),
        (["--transcode", "v", "--size", "64"], "lie one in the other"),
    ],
)
def test_options_that_do_not_fit(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_numbered(tmp_path / "v", "mjpeg", num_frames=5)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        main(["v", "--out", "i.jsonl", *options])
    assert message in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["v"]
