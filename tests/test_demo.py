"""demo.py: which files it calls and which folder it uses; .ci/run runs the whole of it."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
from small_runs import REPOSITORY, call

from engine import demo


@pytest.fixture
def called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The demo's commands, from a working directory elsewhere; the fifth, measure.py, fails."""
    calls: list[list[str]] = []

    def note(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        return subprocess.CompletedProcess(command, returncode=3 * (len(calls) == 5))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", note)
    return calls


def test_its_files_are_found_from_elsewhere(called: list[list[str]]) -> None:
    finished = call(demo.main)
    assert "this command failed with exit code 3: python " in finished.error
    ours = (".py", ".yaml")
    files = [[Path(word).resolve() for word in c if word.endswith(ours)] for c in called]
    trained = [REPOSITORY / "engine/train.py", REPOSITORY / "configs/sample.yaml"]
    last = [[REPOSITORY / "engine" / name] for name in ("sample.py", "measure.py")]
    assert files == [trained, trained, trained, *last]


def test_quick_starts_anew_in_a_folder_of_its_own(called: list[list[str]]) -> None:
    """Neither a demo nor an earlier check is resumed, or lost."""
    full, quick, mine = Path("runs/demo/a"), Path("runs/demo-quick/a"), Path("mine/a")
    for file in (full, quick, mine):
        file.parent.mkdir(parents=True)
        file.touch()
    for options, folder in (
        (["--quick"], quick.parent),
        ([], full.parent),
        (["--quick", "--out", "mine"], mine.parent),
    ):
        called.clear()
        assert call(demo.main, *options).code == 2
        for command in called[:3]:
            assert command[command.index("--out") + 1] == str(folder)
        for command in called[3:]:
            assert command[command.index("--checkpoint") + 1] == str(folder)
        assert called[4][called[4].index("--out") + 1] == str(folder / "figures.json")
    assert (full.exists(), quick.exists(), mine.exists()) == (True, False, True)


def test_length_and_seed_reach_every_stage(called: list[list[str]]) -> None:
    assert call(demo.main, "--long", "--seed", "3").code == 2  # the fifth command's
    for command in called[:3]:
        assert command[command.index("--out") + 1] == "runs/demo-long-seed-3"
        settings = [command[i + 1] for i, word in enumerate(command) if word == "--set"]
        assert settings == ["training.seed=3", "variant=long"]
    called.clear()
    assert call(demo.main).code == 2
    assert not any("--set" in command for command in called)
    assert "--seed must be 0 to" in call(demo.main, "--seed", "-1").error
    assert "not allowed with" in call(demo.main, "--long", "--quick").error


def test_a_folder_that_cannot_be_removed(called: list[list[str]]) -> None:
    """A link's target is somebody's."""
    Path("mine").mkdir()
    Path("runs").mkdir()
    Path("runs/demo-quick").symlink_to(Path("mine").resolve())
    assert "cannot remove runs/demo-quick: " in call(demo.main, "--quick").error
    assert Path("mine").exists()
    assert not called
