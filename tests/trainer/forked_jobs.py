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

import torch
from shared_batch import frames_shared, make_sharing
from small_runs import free_port

from engine.configuration import load_config
from engine.models.layers import divided_one_by_one
from engine.train import main
from engine.trainer import stage_run  # noqa: F401 — imports DeepSpeed before the ranks fork
from engine.trainer.deepspeed_engines import whole_state
from engine.trainer.ranks import Ranks


def train(*runs: list[str]) -> None:
    """Runs of train.py, given their command lines."""
    disconnect = Ranks.disconnect
    Ranks.disconnect = lambda self: None  # type: ignore[method-assign]  # kept for the next run
    for arguments in runs:
        main(arguments)
    disconnect(Ranks.from_environment())


def share(config_file: str, *runs: dict[str, Any]) -> None:
    """Two steps of ranks that share one global batch; their measures and weights in a file.

    A run has a `stage`, `overrides` of the configuration and the `file`; and whether every layer
    divides its own weight, `one_by_one`, as ZeRO-3 has it always.
    """
    ranks = Ranks.from_environment()
    ranks.connect()
    for run in runs:
        config = load_config(config_file, run["overrides"])
        training = config.stages[run["stage"]].training
        trainer = make_sharing(ranks, config, run["stage"])
        division = divided_one_by_one() if run["one_by_one"] else contextlib.nullcontext()
        with frames_shared(ranks, training.micro_batch), division:
            measures = [trainer.train_step() for _ in range(2)]
        weights = {
            name: whole_state(network, zero_stage=training.zero_stage, keep=ranks.is_main)
            for name, network in (
                ("G", trainer.g_engine.module),
                ("D", trainer.d_engine.module),
            )
        }
        if ranks.is_main:
            torch.save({"measures": measures, "weights": weights}, run["file"])
    ranks.disconnect()


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
