"""How many CPU cores there are for this process."""

import os
import re

# What launchers say of the processes on this machine: torchrun, deepspeed, srun.
_LOCAL_PROCESSES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE")


def cores_per_process() -> int:
    """The cores that this process may run on, divided by the job's processes on this machine."""
    told = next((os.environ[name] for name in _LOCAL_PROCESSES if name in os.environ), "1")
    number = re.match(r"\d+", told)  # srun says 8(x2) for two machines with eight each
    processes = max(1, int(number[0])) if number else 1
    return max(1, len(os.sched_getaffinity(0)) // processes)
