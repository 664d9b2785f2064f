"""Ranks that are forks of one process: `python forked_jobs.py DESCRIPTOR`; see `forks.Forks`.

Importing torch and DeepSpeed takes longer than most jobs of the tiny configuration, so it is done
once. Every line on standard input is a job; see `run_job`. Two lines of JSON answer each: the
ranks' process numbers, and, when all have ended, their exit codes.
"""

import os

# Before torch is imported. As many ranks as are wanted, and forks: on CPUs, also where GPUs are.
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}

import contextlib
import ctypes
import gc
import json
import resource
import runpy
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import torch
import torch._dynamo  # PyTorch and DeepSpeed import it late, which each rank would do by itself
from shared_batch import frames_shared, make_sharing
from torch import Tensor

from engine.configuration import load_config
from engine.models.spectral import divided_one_by_one
from engine.train import main
from engine.trainer import adam, stage_run  # noqa: F401 — imports DeepSpeed before the ranks fork
from engine.trainer.deepspeed_engines import whole_state
from engine.trainer.engine_state import check_shards, load_shards, shard_of
from engine.trainer.ranks import Ranks
from engine.trainer.step import Trainer

with contextlib.suppress(ImportError):  # not in every version
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 — late, as the compiler is


def script(path: str, *arguments: str) -> None:
    """`python PATH ARGUMENTS`."""
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


def module(name: str, *arguments: str) -> None:
    """`python -m NAME ARGUMENTS`."""
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


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
    divides its own weight, `one_by_one`, as ZeRO-3 has it always. After the first step it `saves`
    its state into a folder, perhaps. One that `loads` such a folder, which may be of other ranks,
    does the second step only.

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
        num_steps = 2
        if "loads" in run:
            load_state(trainer, training.zero_stage, Path(run["loads"]))
            num_steps = 1
        before = whole_weights(trainer, training.zero_stage, keep=ranks.is_main)
        with frames_shared(ranks, training.samples_per_pass), division:
            measures = [trainer.train_step()]
            if "saves" in run:
                save_state(trainer, training.zero_stage, Path(run["saves"]), ranks)
            measures += [trainer.train_step() for _ in range(num_steps - 1)]
        weights = whole_weights(trainer, training.zero_stage, keep=ranks.is_main)
        if ranks.is_main:
            found = {"measures": measures, "before": before, "weights": weights}
            torch.save(found, run["file"])
    ranks.disconnect()


def save_state(trainer: Trainer, zero_stage: int, folder: Path, ranks: Ranks) -> None:
    """What a checkpoint has of the step: every rank's shards, and where random numbers are."""
    folder.mkdir(exist_ok=True)
    for name, engine in (("G", trainer.g_engine), ("D", trainer.d_engine)):
        shard = shard_of(engine, zero_stage=zero_stage, rank=ranks.rank)
        torch.save(shard, folder / f"{name}-{ranks.rank}.pt")
    if ranks.is_main:
        torch.save(trainer.state_dict(), folder / "trainer.pt")
    ranks.barrier()


def load_state(trainer: Trainer, zero_stage: int, folder: Path) -> None:
    """What `save_state` wrote, of however many ranks."""
    for name, engine in (("G", trainer.g_engine), ("D", trainer.d_engine)):
        files = sorted(folder.glob(f"{name}-*.pt"))
        shards = [torch.load(file, weights_only=True, mmap=True) for file in files]
        check_shards(engine.module, shards, str(folder))
        load_shards(engine, shards, zero_stage=zero_stage)
    trainer.load_state_dict(torch.load(folder / "trainer.pt", weights_only=True))


def whole_weights(trainer: Trainer, zero_stage: int, *, keep: bool) -> dict[str, dict[str, Tensor]]:
    """Copies of both networks' states on the ranks that keep them; all ranks call this."""
    return {
        name: whole_state(engine.module, zero_stage=zero_stage, keep=keep)
        for name, engine in (("G", trainer.g_engine), ("D", trainer.d_engine))
    }


JOBS: dict[str, Callable[..., None]] = {
    "script": script,
    "module": module,
    "train": train,
    "share": share,
}


def run_job(function: str, arguments: list[Any], ranks: list[dict[str, str]], console: str) -> None:
    """Call a function of `JOBS` in a fork per rank, given the ranks' environment variables.

    What they say goes to the files CONSOLE.out and CONSOLE.err.
    """
    children = []
    for variables in ranks:
        child = os.fork()
        if child == 0:
            become_rank(function, arguments, variables, console)
        children.append(child)
    tell(children)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    tell(codes)


def end_with_parent() -> None:
    """So that ranks that wait for each other are not left behind when the tests are killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def tell(numbers: list[int]) -> None:
    """A line on the descriptor that this process was given: DeepSpeed talks on standard output."""
    os.write(int(sys.argv[1]), f"{json.dumps(numbers)}\n".encode())


def become_rank(
    function: str, arguments: list[Any], variables: dict[str, str], console: str
) -> NoReturn:
    """What a fork does, to its end."""
    end_with_parent()
    os.environ |= variables
    files = os.devnull, f"{console}.out", f"{console}.err"
    for descriptor, file in enumerate(files):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND if descriptor else os.O_RDONLY
        os.dup2(os.open(file, flags), descriptor)
    code = 1
    if "FULL_DISK_BYTES" in variables:  # no file of this rank grows beyond: it fails as if full
        limit = int(variables["FULL_DISK_BYTES"])
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        JOBS[function](*arguments)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


if __name__ == "__main__":
    end_with_parent()
    gc.collect()
    gc.freeze()  # DeepSpeed collects often, which is to pass over what has been imported
    for line in sys.stdin:
        run_job(**json.loads(line))
