"""Jobs of several ranks each, one after another: `python forked_jobs.py JOBS.json`.

Importing torch and DeepSpeed takes longer than most of these jobs, so it is done once and the ranks
are forks. JOBS.json lists [number of ranks, "train" or "share", arguments]; every rank calls that
function below with them. All jobs must succeed.
"""

import os

# Before torch is imported. As many ranks as are wanted, and forks: on CPUs, also where GPUs are.
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1"}

import contextlib
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import torch
from shared_batch import frames_shared, make_sharing
from small_runs import free_port
from torch import Tensor

from engine.configuration import load_config
from engine.models.spectral import divided_one_by_one
from engine.train import main
from engine.trainer import adam, stage_run  # noqa: F401 — imports DeepSpeed before the ranks fork
from engine.trainer.deepspeed_engines import whole_state
from engine.trainer.ranks import Ranks
from engine.trainer.step import Trainer


def train(*runs: list[str]) -> None:
    """Runs of train.py, given their command lines."""
    disconnect = Ranks.disconnect
    Ranks.disconnect = lambda self: None  # type: ignore[method-assign]  # kept for the next run
    for arguments in runs:
        main(arguments)
    disconnect(Ranks.from_environment())


def share(config_file: str, *runs: dict[str, Any]) -> None:
    """Two steps of ranks that share one global batch; measures and weights, also before, in a file.

    A run has a `stage`, `overrides` of the configuration and the `file`; and whether every layer
    divides its own weight, `one_by_one`, as ZeRO-3 has it always.

    Adam's ε is 1, so that a weight moves by about lr times its gradient. With a small one it moves
    by lr however small the gradient is, also where that is nothing but rounding.
    """
    ranks = Ranks.from_environment()
    ranks.connect()
    for run in runs:
        config = load_config(config_file, run["overrides"])
        training = config.stages[run["stage"]].training
        with mock.patch.object(adam, "EPSILON", 1.0):
            trainer = make_sharing(ranks, config, run["stage"])
        division = divided_one_by_one() if run["one_by_one"] else contextlib.nullcontext()
        before = whole_weights(trainer, training.zero_stage, keep=ranks.is_main)
        with frames_shared(ranks, training.samples_per_pass), division:
            measures = [trainer.train_step() for _ in range(2)]
        weights = whole_weights(trainer, training.zero_stage, keep=ranks.is_main)
        if ranks.is_main:
            found = {"measures": measures, "before": before, "weights": weights}
            torch.save(found, run["file"])
    ranks.disconnect()


def whole_weights(trainer: Trainer, zero_stage: int, *, keep: bool) -> dict[str, dict[str, Tensor]]:
    """Copies of both networks' states on the ranks that keep them; all ranks call this."""
    return {
        name: whole_state(engine.module, zero_stage=zero_stage, keep=keep)
        for name, engine in (("G", trainer.g_engine), ("D", trainer.d_engine))
    }


JOBS: dict[str, Callable[..., None]] = {"train": train, "share": share}


def run_job(num_ranks: int, name: str, arguments: list[Any]) -> bool:
    """Fork the ranks and wait for them; whether all succeeded."""
    os.environ |= {"WORLD_SIZE": str(num_ranks), "MASTER_PORT": str(free_port())}
    children = []
    for rank in range(num_ranks):
        child = os.fork()
        if child == 0:
            become_rank(rank, name, arguments)
        children.append(child)
    codes = [os.waitpid(child, 0)[1] for child in children]
    return not any(codes)


def become_rank(rank: int, name: str, arguments: list[Any]) -> NoReturn:
    """What a fork does, to its end."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    try:
        JOBS[name](*arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        if not run_job(*job):
            sys.exit(f"failed: {job}")
