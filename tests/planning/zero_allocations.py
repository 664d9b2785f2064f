"""What DeepSpeed's engines really allocate, as JSON.

Of one network, in this process as rank 0 of a job whose other ranks are pretended: collective
operations do nothing, but take the same memory. Counted by the allocator's own events. For every
number of ranks, ZeRO stage and number of micro-batches, with the optimizer in its place and
offloaded: bytes at rest, most in a pass and most from its end on.
"""

import gc
import json
import os
import time
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from engine.configuration import Training
from engine.trainer import deepspeed_engines
from engine.trainer.ranks import leave_out_inference_collectives

AS_TRAINED = deepspeed_engines.deepspeed_settings
WIDTH, DEPTH, BUCKET = 200, 5, 60_000  # one and a half layers in a bucket


CASES = [(ranks, False) for ranks in (1, 2, 8)] + [(2, True)]


def main() -> list[dict[str, Any]]:
    warnings.filterwarnings("ignore")
    deepspeed_engines.deepspeed_settings = settings
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True):
        torch.ones(1)  # the first profile of a process loses events
    return [
        allocations(stage, num_ranks, offload, num_micro_batches)
        for num_ranks, offload in CASES
        for stage in ((1, 2, 3) if offload else (0, 1, 2, 3))
        for num_micro_batches in (1, 2)
    ]


def pretend(num_ranks: int) -> None:
    """This process is rank 0 of as many."""
    import deepspeed

    if dist.is_initialized():
        dist.destroy_process_group()
        deepspeed.comm.comm.cdb = deepspeed.utils.groups._WORLD_GROUP = None
    os.environ.update(RANK="0", WORLD_SIZE=str(num_ranks), LOCAL_RANK="0")
    dist.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())
    leave_out_inference_collectives()
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)


def settings(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """As it is trained, but for the size of buckets, which is the network's."""
    found = AS_TRAINED(*args, **kwargs)
    zero = found["zero_optimization"]
    zero.update(reduce_bucket_size=BUCKET, allgather_bucket_size=BUCKET)
    zero["stage3_param_persistence_threshold"] = WIDTH
    return found


def allocations(
    stage: int, num_ranks: int, offload: bool, num_micro_batches: int
) -> dict[str, Any]:
    pretend(num_ranks)
    training = Training(
        iterations=1,
        global_batch=num_ranks * num_micro_batches,
        micro_batch=1,
        zero_stage=stage,
        offload_optimizer=offload,
    )
    gc.collect()
    marks: list[tuple[int, str]] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:

        def mark(name: str) -> None:
            marks.append((time.time_ns(), name))

        mark("building")
        network = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)])
        engine = deepspeed_engines.make_engine(
            network,
            lr=1e-3,
            training=training,
            world_size=num_ranks,
            accumulation_steps=num_micro_batches,
        )
        for step in range(3):  # Adam has its moments after the first, ZeRO-3 its plan
            for _ in range(num_micro_batches):
                mark(f"pass {step}")
                engine.backward(engine(torch.ones(1, WIDTH)).sum())
                mark(f"update {step}")
                engine.step()
            mark(f"rest {step}")
    most, now = most_by_phase(profiler, marks)
    return {
        "num_ranks": num_ranks,
        "offload": offload,
        "zero_stage": stage,
        "num_micro_batches": num_micro_batches,
        "rest": now,
        "pass": most["pass 2"],
        "update": most["update 2"],
    }


def most_by_phase(profiler: Any, marks: list[tuple[int, str]]) -> tuple[dict[str, int], int]:
    """The most bytes in each phase, and what there is at the end of the last."""
    events = [
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    most: dict[str, int] = {}
    now, phases = 0, iter([*marks, (2**63, "")])
    phase, (until, following) = "", next(phases)
    for when, num_bytes in sorted(events, key=lambda event: event[0]):
        while when >= until:
            phase, (until, following) = following, next(phases)
            most[phase] = max(most.get(phase, 0), now)
        now += num_bytes
        most[phase] = max(most.get(phase, 0), now)
    return most, now


if __name__ == "__main__":
    print("allocations:", json.dumps(main()))
