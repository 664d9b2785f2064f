"""Who this process is among the ranks, on which device, and whether all ranks see one folder.

`deepspeed` and `torchrun` set RANK, WORLD_SIZE and LOCAL_RANK; SLURM's `srun` numbers its tasks in
variables of its own. Without any of them the process is a job of one.
"""

import os
import secrets
import socket
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from engine.durable_files import writing
from engine.errors import UserError
from engine.models.construction import forbid_tf32

# Rank 0 may be making the sample data set or the previous stage's statistics.
_TIMEOUT = timedelta(hours=1)


@dataclass(frozen=True)
class Ranks:
    """This process's place in the job."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    _hosts: list[dist.ProcessGroup] = field(default_factory=list, compare=False, repr=False)
    """Beside NCCL's group one of gloo's, once connected: what hosts agree on waits for no GPU."""

    @property
    def is_main(self) -> bool:
        """Rank 0 talks, logs and names checkpoints."""
        return self.rank == 0

    @staticmethod
    def alone(device: torch.device) -> "Ranks":
        """A job of one."""
        return Ranks(0, 1, 0, device)

    @staticmethod
    def from_environment() -> "Ranks":
        """Read the launcher's variables; nothing is connected yet.

        Raises UserError where `srun` started several tasks that cannot find each other.
        """
        environment = os.environ
        names = "RANK", "WORLD_SIZE", "LOCAL_RANK"
        by_srun = "RANK" not in environment and int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1
        if by_srun:
            names = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"
            missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
            if missing:
                raise UserError(
                    f"srun started {environment['SLURM_STEP_NUM_TASKS']} tasks without "
                    f"{' and '.join(missing)}: export them, or start torchrun once per node"
                )
        rank, world_size, local_rank = (
            int(environment.get(name, default))
            for name, default in zip(names, (0, 1, 0), strict=True)
        )
        device = torch.device("cpu")
        if torch.cuda.is_available():
            if by_srun and torch.cuda.device_count() == 1:  # a task that sees its own GPU only
                local_rank = 0
            device = torch.device("cuda", local_rank)
        return Ranks(rank, world_size, local_rank, device)

    def connect(self) -> None:
        """Join the process group: NCCL on GPUs, gloo on CPUs."""
        import deepspeed  # slow, and talkative: only once the console has captured its output

        os.environ.setdefault("RANK", str(self.rank))
        os.environ.setdefault("WORLD_SIZE", str(self.world_size))
        os.environ.setdefault("LOCAL_RANK", str(self.local_rank))
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        if "MASTER_PORT" not in os.environ:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        forbid_tf32()
        leave_out_inference_collectives()
        deepspeed.init_distributed(
            dist_backend="nccl" if self.device.type == "cuda" else "gloo",
            auto_mpi_discovery=False,
            timeout=_TIMEOUT,
            verbose=False,
        )
        if self.device.type == "cuda" and self.world_size > 1:
            self._hosts.append(dist.new_group(backend="gloo", timeout=_TIMEOUT))

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def broadcast(self, value: int) -> int:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        cell = torch.tensor([value])
        dist.broadcast(cell, src=0, group=self._host_group)
        return int(cell.item())

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. Collective."""
        return bool(self.largest(int(flag)))

    def largest(self, value: int) -> int:
        """The largest of all ranks' values. Collective."""
        if self.world_size == 1:
            return value
        cell = torch.tensor([value])
        dist.all_reduce(cell, op=dist.ReduceOp.MAX, group=self._host_group)
        return int(cell.item())

    def gather(self, value: Any) -> list[Any]:
        """All ranks' values, which may be anything that pickles, on every rank. Collective."""
        found = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(found, value, group=self._host_group)
        return found

    def first_text(self, text: str) -> str:
        """The text of the lowest rank that has one. Collective."""
        return next(filter(None, self.gather(text)), "")

    @property
    def _host_group(self) -> dist.ProcessGroup | None:
        return self._hosts[0] if self._hosts else None

    def first_failure(self, exit_code: int) -> int | None:
        """None when no rank failed before this one; else the exit code of the first that did.

        A rank that leaves makes the others' collectives fail: what they meet is only its echo.
        """
        if self.world_size == 1 or not dist.is_initialized():
            return None
        mine = f"{self.rank} {exit_code}"
        try:
            store = dist.distributed_c10d._get_default_store()
            first = store.compare_set("first failure", "", mine).decode()
        except dist.DistError:  # rank 0, which may hold the store, has left already
            return exit_code
        return None if first == mine else int(first.split()[1])

    def disconnect(self) -> None:
        """Leave the group; without this gloo's threads can abort the process at exit."""
        if dist.is_initialized():
            dist.destroy_process_group()


def leave_out_inference_collectives() -> None:
    """Keep DeepSpeed from compiling, on CPUs, collectives that only its inference uses.

    Due before `deepspeed.init_distributed`.
    """
    import deepspeed  # slow, and talkative

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def derived_seed(purpose: str, *path: int) -> int:
    """A seed for one purpose, independent of the seeds of all other purposes and paths."""
    # The length is hashed too: SeedSequence itself takes (1, 0) for (1,).
    entropy = [int.from_bytes(purpose.encode()), len(path), *path]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


def check_shared(folder: Path, ranks: Ranks) -> None:
    """Every rank must see what rank 0 writes to `folder`. Collective.

    Raises UserError, on every rank, where one does not: it would keep its part of a checkpoint, or
    look for one, elsewhere.
    """
    if ranks.world_size == 1:
        return
    # A name that nobody has looked for yet: network file systems remember what was not there.
    token = folder / f".shared-{ranks.broadcast(secrets.randbits(62)):x}"
    if ranks.is_main:
        with writing(token):
            token.touch()
    ranks.barrier()
    unseen = ranks.any(not token.exists())
    if ranks.is_main:
        token.unlink()
    if unseen:
        raise UserError(
            f"{folder} is not one folder on all nodes; give --out a path on a file system that "
            "they share"
        )
