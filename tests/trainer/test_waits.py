"""A run that waits for its clips says so, and what it costs is measured."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import Tiny, call

import engine.train
from engine import processors
from engine.configuration import load_config
from engine.processors import cores_per_process
from engine.trainer.reals import ClipWaits, Reals
from engine.video.loader import LoadedClips


def test_little_waiting_is_not_told() -> None:
    waits = ClipWaits(2)
    for _ in range(100):
        waits.add(waited=0.04, taken=1.0)
        assert waits.remedy() is None
    assert waits.share == pytest.approx(0.04)
    assert waits.shown == ""


def test_much_waiting_is_told_once_and_shown_while_it_lasts() -> None:
    waits, told = ClipWaits(3), []
    for _ in range(60):
        waits.add(waited=0.3, taken=1.0)
        told.append(waits.remedy())
    (line,) = [line for line in told if line]
    assert told.index(line) == 19  # the first steps say nothing
    assert line.startswith("note: 30% of the time is spent waiting for clips, with 3 decoding thr")
    assert "data.num_threads" in line
    assert "engine/prepare.py --transcode" in line
    assert waits.shown == "waits for clips 30%"
    for _ in range(20):
        waits.add(waited=0.0, taken=1.0)
    assert waits.shown == ""


def test_the_wait_for_a_batch_is_measured() -> None:
    class Slow:
        def __next__(self) -> LoadedClips:
            time.sleep(0.05)
            return LoadedClips(torch.zeros(1, 2, 3, 4, 4), torch.zeros(1, dtype=torch.long))

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    reals = Reals(Slow(), load_config("configs/sample.yaml"), 1)
    for _ in range(3):
        reals.next()
    assert 0.15 <= reals.seconds_waited < 1


def test_a_run_tells_the_remedy(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ClipWaits, "remedy", lambda waits: f"note: {len(waits._last)} steps waited")
    done = call(engine.train.main, *tiny.options(1, tmp_path, "--max-steps", "2"))
    assert done.code == 0
    told = [line for line in done.out.splitlines() if "steps waited" in line]
    assert told == ["note: 1 steps waited", "note: 2 steps waited"]
    lines = (tmp_path / "stage1/log.jsonl").read_text().splitlines()
    assert all(0 <= json.loads(line)["waiting_for_clips"] <= 1 for line in lines)


@pytest.mark.parametrize(
    ("environment", "cores"),
    [
        ({}, 16),
        ({"LOCAL_WORLD_SIZE": "8"}, 2),
        ({"LOCAL_SIZE": "5"}, 3),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, 4),
        ({"LOCAL_WORLD_SIZE": "64"}, 1),
    ],
)
def test_a_process_has_its_share_of_the_cores(
    environment: dict[str, str], cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*processors._LOCAL_PROCESSES, processors._BY_SRUN):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processors.os, "sched_getaffinity", lambda process: set(range(16)))
    monkeypatch.setattr(processors.os, "cpu_count", lambda: 16)
    assert cores_per_process() == cores


def test_cores_that_srun_gave_to_one_task_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in processors._LOCAL_PROCESSES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(processors._BY_SRUN, "8(x4)")
    monkeypatch.setattr(processors.os, "sched_getaffinity", lambda process: set(range(12)))
    monkeypatch.setattr(processors.os, "cpu_count", lambda: 96)
    assert cores_per_process() == 12
