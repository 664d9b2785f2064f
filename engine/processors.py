"""How many CPU cores, and processes of the job, there are on this machine."""

import os
import re

# What launchers say of the processes on this machine: torchrun, deepspeed, and srun where it leaves
# all cores to every task.
_LOCAL_PROCESSES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
_BY_SRUN = "SLURM_STEP_TASKS_PER_NODE"


def cores_per_process() -> int:
    """The cores that this process may run on, divided by the job's processes on this machine."""
    cores = usable_cores()
    # srun, unless told otherwise, gives every task cores of its own.
    are_shared = cores == os.cpu_count() or any(name in os.environ for name in _LOCAL_PROCESSES)
    return max(1, cores // local_processes()) if are_shared else cores


def local_processes() -> int:
    """The job's processes on this machine."""
    names = (*_LOCAL_PROCESSES, _BY_SRUN)
    told = next((os.environ[name] for name in names if name in os.environ), "1")
    number = re.match(r"\d+", told)  # srun says 8(x2) for two machines with eight each
    return max(1, int(number[0]) if number else 1)


def usable_cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0))
