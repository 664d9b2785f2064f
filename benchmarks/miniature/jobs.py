"""What is to be done for one seed, one command after the other, and the processes that do it.

Every job is a command that a user can type. A job that is done is not started again; training that
was cut off goes on from its newest checkpoint, which is engine/train.py's own doing.
"""

import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks.miniature.budget import STAGE_1
from benchmarks.miniature.measured import OF_REAL_CLIPS, read_measured
from benchmarks.miniature.models import FULL, MODELS, Model, folder_of
from benchmarks.miniature.plan import MiniaturePlan
from engine.command_line import REPOSITORY
from engine.durable_files import writing
from engine.errors import UserError
from engine.trainer.checkpoints import find_checkpoint

SHARED = "stage-1"
"""The folder of the stage 1 that models of one seed share."""


@dataclass(frozen=True)
class Job:
    """A command, and where one sees how far it is."""

    title: str
    command: tuple[str, ...]
    log: Path
    steps_log: Path | None = None
    """engine/train.py's log.jsonl."""
    num_steps: int = 0

    @property
    def progress(self) -> str:
        """Its title, with the step where it trains."""
        if self.steps_log is None:
            return self.title
        return f"{self.title}, step {_last_step(self.steps_log)} of {self.num_steps}"


def jobs_of(plan: MiniaturePlan, seed: int) -> list[Job]:
    """Everything that is still to do for a seed, in order."""
    out = plan.out
    unmeasured = [model for model in MODELS if read_measured(out, seed, model.name) is None]
    untrained = [model for model in unmeasured if not _is_trained(plan, seed, model)]
    jobs = []
    if any(model.shares_stage_1 for model in untrained) and not _is_reached(
        folder_of(out, seed, SHARED), 1, plan.iterations[STAGE_1]
    ):
        jobs.append(_training(plan, seed, FULL, 1))
    jobs += [_training(plan, seed, model, model.stage_number) for model in untrained]
    if unmeasured or any(read_measured(out, seed, name) is None for name in OF_REAL_CLIPS):
        command = ("-m", "benchmarks.miniature.measuring", "--out", str(out), "--seed", str(seed))
        log = folder_of(out, seed, "measuring.log")
        num = len(unmeasured)
        jobs.append(Job(f"measuring {num} model{'s' * (num != 1)}", command, log))
    return jobs


def _training(plan: MiniaturePlan, seed: int, model: Model, number: int) -> Job:
    """The job that trains a model, or with `number` 1 of a two-stage one the shared stage 1."""
    is_shared = number < model.stage_number
    name, key = (SHARED, STAGE_1) if is_shared else (model.name, model.name)
    folder = folder_of(plan.out, seed, name)
    config = folder / "config.yaml"
    with writing(config):
        folder.mkdir(parents=True, exist_ok=True)
        config.write_text(yaml.safe_dump(plan.config(model, seed).to_tree(), sort_keys=False))
    script = os.path.relpath(REPOSITORY / "engine/train.py")
    command = [script, "--config", str(config), "--stage", str(number), "--out", str(folder)]
    if number == 2 and model.shares_stage_1:
        command += ["--previous", str(folder_of(plan.out, seed, SHARED))]
    return Job(
        title=f"training {STAGE_1 if is_shared else model.title}",
        command=tuple(command),
        log=folder / "training.log",
        steps_log=folder / f"stage{number}" / "log.jsonl",
        num_steps=plan.iterations[key],
    )


def _is_trained(plan: MiniaturePlan, seed: int, model: Model) -> bool:
    folder = folder_of(plan.out, seed, model.name)
    return _is_reached(folder, model.stage_number, plan.iterations[model.name])


def _is_reached(folder: Path, number: int, iterations: int) -> bool:
    try:
        return find_checkpoint(folder, stage_number=number).step >= iterations
    except UserError:
        return False


class Stopped(Exception):  # noqa: N818 — not an error
    """The run was told to end."""


class Processes:
    """The running jobs, by seed: one process each, all of which can be told to stop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[int, tuple[Job, subprocess.Popen[bytes]]] = {}
        self._is_stopped = False

    def run(self, seed: int, job: Job) -> None:
        """Run a job to its end.

        Raises Stopped when all were told to stop, UserError that names the log when it fails.
        """
        with writing(job.log), job.log.open("ab") as log:
            with self._lock:
                if self._is_stopped:
                    raise Stopped
                process = subprocess.Popen(
                    [sys.executable, *job.command],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=_environment(),
                    start_new_session=True,  # Ctrl-C is ours to pass on
                )
                self._running[seed] = job, process
            code = process.wait()
        with self._lock:
            del self._running[seed]
            if self._is_stopped:
                raise Stopped
        if code:
            shown = shlex.join(["python", *job.command])
            raise UserError(f"this command failed with exit code {code}: {shown} (see {job.log})")

    def stop(self) -> None:
        """Ask our processes to end; training writes a checkpoint first."""
        with self._lock:
            self._is_stopped = True
            for _, process in self._running.values():
                process.terminate()

    def progress(self) -> Iterator[tuple[int, str]]:
        """Each seed's running job and how far it is."""
        with self._lock:
            running = {seed: job for seed, (job, _) in self._running.items()}
        for seed in sorted(running):
            yield seed, running[seed].progress


def _environment() -> dict[str, str]:
    """One thread for each process, on the CPU, which training leaves when this process is gone."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    # As from a launcher: engine/trainer/interruption.py then watches the process that started it.
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    kept = {k: v for k, v in os.environ.items() if k not in ("MASTER_ADDR", "MASTER_PORT")}
    threads = {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "10000"}
    device = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return kept | ranks | threads | device | {"PYTHONPATH": path}


def _last_step(log: Path) -> int:
    try:
        lines = log.read_text().splitlines()
        return int(json.loads(lines[-1])["step"])
    except (OSError, ValueError, IndexError, KeyError, TypeError):
        return 0  # not begun, or in the middle of a line
