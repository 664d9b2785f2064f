"""What DeepSpeed compiles when it is first used, and locks that killed builds leave.

PyTorch builds an extension under a lock: a file that it makes, keeps open and removes. A process
that is killed meanwhile leaves the file, and all later ones wait for it, silently and for ever.
"""

import os
import time
from pathlib import Path

from engine.errors import UserError

OTHER_NODES_SECONDS = 120
"""How long a lock may be that no process of this machine holds: nodes may share a home folder."""


def leave_out_inference_collectives() -> None:
    """On CPUs DeepSpeed would compile collectives that only its inference uses; before
    `deepspeed.init_distributed`."""
    import deepspeed  # slow, and talkative

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def check_build_lock(operator: str) -> None:
    """UserError, in one line, where DeepSpeed's `operator` is locked by a build that was killed."""
    from torch.utils.cpp_extension import _get_build_directory  # slow

    lock = Path(_get_build_directory(operator, False), "lock")
    while (age := _age(lock)) is not None and not _is_open(lock):
        if age > OTHER_NODES_SECONDS:
            raise UserError(
                f"{lock} is left of a build that was killed, and nothing can be built until it is "
                "gone: remove it"
            )
        time.sleep(1)


def _age(path: Path) -> float | None:
    """Seconds, or None where there is no such file."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return None


def _is_open(path: Path) -> bool:
    """Whether a process of this machine has it open, as far as this user may see."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            with os.scandir(process / "fd") as descriptors:
                if any(os.readlink(descriptor.path) == str(path) for descriptor in descriptors):
                    return True
        except OSError:  # it ended, or is another user's
            continue
    return False
