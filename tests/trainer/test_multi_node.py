"""Several nodes, played by as many launchers on this machine, each in a folder of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forks import Forks
from small_runs import (
    LAUNCHER_VARIABLES,
    REPOSITORY,
    Tiny,
    contents,
    differences,
    environment,
    free_port,
    logged,
)

from engine.errors import UserError
from engine.trainer.ranks import Ranks, check_shared

SCRIPT = str(REPOSITORY / "engine/train.py")
Launcher = Callable[[Path, int, int, int], list[str]]
"""(folder for files, port, number of nodes, this node) → the command before train.py."""


def torchrun(folder: Path, port: int, num_nodes: int, node: int) -> list[str]:
    options = ["--nnodes", num_nodes, "--node_rank", node, "--nproc_per_node", 1]
    options += ["--master_addr", "127.0.0.1", "--master_port", port]
    return [sys.executable, "-m", "torch.distributed.run", *map(str, options)]


def deepspeed(folder: Path, port: int, num_nodes: int, node: int) -> list[str]:
    """As started by hand on every node. Its hosts must differ in name: two of this one's."""
    hostfile = folder / "hostfile"
    hostfile.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    options = ["--hostfile", hostfile, "--no_ssh", "--node_rank", node]
    options += ["--master_addr", "127.0.0.1", "--master_port", port, "--log_level", "error"]
    program = Path(sys.executable).with_name("deepspeed")
    return [sys.executable, str(program), *map(str, options)]


@contextmanager
def nodes(
    tmp_path: Path, launcher: Launcher, arguments: list[str]
) -> Iterator[list[subprocess.Popen[str]]]:
    """Two launchers of `train.py ARGUMENTS`; neither outlives the block."""
    port = free_port()
    running = []
    for node in range(2):
        folder = tmp_path / f"node{node}"
        folder.mkdir()
        command = [*launcher(folder, port, 2, node), SCRIPT, *arguments]
        running.append(
            subprocess.Popen(
                command,
                cwd=folder,
                env=environment(),
                text=True,
                stdout=(folder / "console").open("w"),
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        )
    try:
        yield running
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def console(tmp_path: Path) -> str:
    """What both nodes said."""
    return "".join((tmp_path / f"node{node}/console").read_text() for node in range(2))


@pytest.fixture(scope="module")
def one_node(tiny: Tiny, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of two ranks on one node: `srun python engine/train.py`, played by two processes
    with its variables."""
    out, port = tmp_path_factory.mktemp("one-node"), free_port()
    tasks = []
    for task in range(2):
        variables = {"SLURM_PROCID": task, "SLURM_STEP_NUM_TASKS": 2, "SLURM_LOCALID": task}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        tasks.append({k: str(v) for k, v in {**variables, **address}.items()})
    done = forks.job("script", [SCRIPT, *options(tiny, out, "--max-steps", "2")], tasks)
    assert done.code == 0, done.err
    return out


def options(tiny: Tiny, out: Path, *more: str) -> list[str]:
    """Of train.py, for two ranks."""
    return tiny.options(1, out, "--set", "training.micro_batch=2", *more)


@pytest.mark.long
def test_two_nodes_of_deepspeed_train_as_one_node_does(
    tiny: Tiny, one_node: Path, tmp_path: Path
) -> None:
    """Bit for bit: only where the ranks run is different."""
    out = tmp_path / "shared"
    with nodes(tmp_path, deepspeed, options(tiny, out, "--max-steps", "2")) as running:
        codes = [process.wait(timeout=240) for process in running]
    assert codes == [0, 0], console(tmp_path)
    assert console(tmp_path).count("done: ") == 1
    assert logged(out / "stage1") == logged(one_node / "stage1")
    assert_same_second_step(out, one_node)
    assert list(out.rglob(".shared-*")) == []


@pytest.mark.long
def test_two_nodes_of_torchrun_do_too_and_one_signal_stops_both(
    tiny: Tiny, one_node: Path, tmp_path: Path
) -> None:
    """With a checkpoint. That a signal ended it is a failure to the launcher that got it."""
    out = tmp_path / "shared"
    more = ["training.checkpoint_every=2", "training.keep_checkpoints=100000"]
    sets = [word for setting in more for word in ("--set", setting)]
    log = out / "stage1/log.jsonl"
    with nodes(tmp_path, torchrun, options(tiny, out, "--max-steps", "100000", *sets)) as running:
        deadline = time.monotonic() + 200
        while not (log.exists() and log.read_text().count("\n") >= 3):
            assert time.monotonic() < deadline, console(tmp_path)
            assert all(process.poll() is None for process in running), console(tmp_path)
            time.sleep(0.2)
        running[0].send_signal(signal.SIGTERM)
        codes = [process.wait(timeout=120) for process in running]
    assert 0 not in codes
    assert logged(out / "stage1")[:2] == logged(one_node / "stage1")
    assert_same_second_step(out, one_node)
    checkpoint = sorted((out / "stage1/checkpoints").iterdir())[-1]
    assert checkpoint.name == f"step-{logged(out / 'stage1')[-1]['step']:08d}"
    assert (checkpoint / "rank-00001.pt").is_file()
    assert f"interrupted: saved {checkpoint}" in console(tmp_path)


def assert_same_second_step(a: Path, b: Path) -> None:
    of_a, of_b = (out / "stage1/checkpoints/step-00000002" for out in (a, b))
    assert differences(contents(of_a), contents(of_b)) == []


NODE = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from engine.errors import UserError
from engine.trainer.ranks import Ranks
from engine.trainer.ranks import check_shared

rank = int(sys.argv[1])
dist.init_process_group("gloo", f"tcp://127.0.0.1:{sys.argv[2]}", rank=rank, world_size=2)
ranks = Ranks(rank, 2, rank, torch.device("cpu"))
for folder in sys.argv[3:]:
    try:
        check_shared(Path(folder), ranks)
        print("shared")
    except UserError as error:
        print(error)
dist.destroy_process_group()
"""


def test_a_folder_that_is_not_shared_is_noticed_by_all(tmp_path: Path) -> None:
    """A relative path, on nodes that work in different folders; an absolute one is shared."""
    port, shared = free_port(), tmp_path / "shared"
    running = []
    for node in range(2):
        folder = tmp_path / f"node{node}"
        for made in (folder / "out", shared):
            made.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", NODE, str(node), str(port), "out", str(shared)]
        running.append(
            subprocess.Popen(
                command, cwd=folder, env=environment(), text=True, stdout=subprocess.PIPE
            )
        )
    for process in running:
        said = process.communicate(timeout=120)[0].splitlines()
        assert said[0].startswith("out is not one folder on all nodes; give --out a path on")
        assert said[1:] == ["shared"]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_folder_that_cannot_be_written(ranks: Ranks, tmp_path: Path) -> None:
    """Rank 0 of two says so; the launcher ends the other, which waits to look."""
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/gone/.*: No such file"):
        check_shared(tmp_path / "gone", replace(ranks, world_size=2))


# SLURM, without torchrun


@pytest.fixture
def step_of_srun(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The variables of task 5 of 8 in a step, the second of its node."""
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    variables = {"SLURM_PROCID": 5, "SLURM_STEP_NUM_TASKS": 8, "SLURM_LOCALID": 1}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    return monkeypatch


def test_tasks_of_srun_are_ranks(step_of_srun: pytest.MonkeyPatch) -> None:
    step_of_srun.setenv("MASTER_ADDR", "node1")
    step_of_srun.setenv("MASTER_PORT", "29500")
    ranks = Ranks.from_environment()
    assert (ranks.rank, ranks.world_size, ranks.is_main) == (5, 8, False)
    for num_gpus, index in ((8, 1), (1, 0)):
        step_of_srun.setattr(torch.cuda, "is_available", lambda: True)
        step_of_srun.setattr(torch.cuda, "device_count", lambda num_gpus=num_gpus: num_gpus)
        ranks = Ranks.from_environment()
        assert (ranks.local_rank, ranks.device) == (index, torch.device("cuda", index))


def test_tasks_that_cannot_find_each_other_are_a_mistake(
    step_of_srun: pytest.MonkeyPatch,
) -> None:
    """Each would train alone otherwise, all of them into one folder."""
    step_of_srun.setenv("MASTER_ADDR", "node1")
    with pytest.raises(UserError, match="started 8 tasks without MASTER_PORT: export"):
        Ranks.from_environment()


def test_a_launcher_within_srun_comes_first(step_of_srun: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 0}.items():
        step_of_srun.setenv(name, str(value))
    ranks = Ranks.from_environment()
    assert (ranks.rank, ranks.world_size, ranks.local_rank) == (3, 4, 0)


def test_a_batch_script_is_no_step(step_of_srun: pytest.MonkeyPatch) -> None:
    """sbatch says how many tasks there may be, and runs its script once."""
    step_of_srun.delenv("SLURM_STEP_NUM_TASKS")
    step_of_srun.setenv("SLURM_PROCID", "0")
    step_of_srun.setenv("SLURM_NTASKS", "8")
    ranks = Ranks.from_environment()
    assert (ranks.rank, ranks.world_size, ranks.local_rank) == (0, 1, 0)
