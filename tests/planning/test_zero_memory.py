"""ZeRO's memory as predicted against what DeepSpeed allocates, counted by the allocator."""

import json
from pathlib import Path
from typing import Any

import pytest
from forks import Forks
from zero_allocations import BUCKET, DEPTH, WIDTH

from engine.configuration import load_config
from engine.planning.rank_memory import ZeroMemory, bucket_bytes, communicated_bytes

SIZES = [WIDTH * WIDTH, WIDTH] * DEPTH


@pytest.mark.slow
def test_deepspeed_allocates_what_is_predicted(forks: Forks) -> None:
    """At rest to a hundredth (step counters and the like), at the peak within a tenth.

    On a CPU main memory and the device's are one.
    """
    done = forks.alone("tests/planning/zero_allocations.py")
    assert done.code == 0, done.out + done.err
    (line,) = (line for line in done.out.splitlines() if line.startswith("allocations:"))
    cases: list[dict[str, Any]] = json.loads(line.removeprefix("allocations:"))
    assert len(cases) == 3 * 8 + 6
    wrong = []
    for case in cases:
        memory = ZeroMemory(
            SIZES,
            case["zero_stage"],
            case["num_ranks"],
            bucket_bytes=4 * BUCKET,
            accumulates=case["num_micro_batches"] > 1,
            offload=case["offload"],
            rank=0,
        )
        rest = memory.weights + memory.optimizer + memory.host
        # A gradient exists before it is taken, beside all others.
        in_pass = memory.gathered + memory.gradients(memory.whole) + memory.largest
        peak = rest + max(in_pass, memory.update)
        found = max(case["pass"], case["update"])
        close = case["rest"] == pytest.approx(rest, rel=0.01), found == pytest.approx(peak, rel=0.1)
        print(case, "predicted:", rest, peak, close)
        if close != (True, True):
            wrong.append(case)
    assert not wrong


def test_a_partition_touches_the_weights_that_it_cuts() -> None:
    """10, 20 and 30 values on two ranks: 0..30 are the first's, two weights; 30..60 one."""
    memory = ZeroMemory([10, 20, 30], 1, 2, bucket_bytes=0)
    assert (memory.whole, memory.partition, memory.touched) == (240, 120, 120)
    # On four: 0..16, 16..32, 32..48, 48..64; the second cuts 20 and 30.
    memory = ZeroMemory([10, 20, 30], 1, 4, bucket_bytes=0)
    assert (memory.partition, memory.touched) == (64, 200)


def test_the_partition_that_touches_most_is_found_without_counting_through_them() -> None:
    """The first, a middle one, the last, and a weight that fills several."""
    for sizes, num_ranks in (([6, 2, 24], 4), ([8, 5, 3, 16], 4), ([22, 5, 5], 2), ([30, 2], 4)):
        by_rank = [ZeroMemory(sizes, 2, num_ranks, 0, rank=rank) for rank in range(num_ranks)]
        assert ZeroMemory(sizes, 2, num_ranks, 0).touched == max(m.touched for m in by_rank)
    assert ZeroMemory([10, 20, 30], 2, 10**15, 0).touched == 4 * 30


def test_the_trainers_bucket() -> None:
    training = load_config(Path(__file__).parents[2] / "configs/sample.yaml").stages[1].training
    assert bucket_bytes(training) == 200_000_000


def test_nothing_is_communicated_alone() -> None:
    for stage in range(4):
        assert communicated_bytes(ZeroMemory([10], stage, 1, bucket_bytes=0), 2) == 0
    # All-reduce on two ranks: each sends half of its gradients, then half of the sums.
    assert communicated_bytes(ZeroMemory([10], 0, 2, bucket_bytes=0), 1) == 40
