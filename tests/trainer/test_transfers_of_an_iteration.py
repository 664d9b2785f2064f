"""What a training iteration makes a GPU's host wait for, counted without a GPU.

tests/pretended_gpu/test_host_waits.py counts it where CUDA would wait; this needs no CUDA.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from forks import Forks

SCRIPT = Path(__file__).parent / "iteration_transfers.py"
MEASURES = 1
UPDATES = 3
"""Two of D, one of G; DeepSpeed reads the gradient's norm in each."""
# A D update copies clips and their labels, then, as G's does, z, labels and the frames to look at.
COPIES = 2 * 5 + 3
# Stage 2's windows need the frozen stage's z, and where they start.
COPIES_OF_WINDOWS = 3 * 2


@pytest.fixture(scope="module")
def found(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """See iteration_transfers.py."""
    done = forks.alone(SCRIPT, tmp_path_factory.mktemp("transfers"))
    lines = [line for line in done.out.splitlines() if line.startswith("transfers:")]
    assert lines, done.out + done.err
    cases: list[dict[str, Any]] = json.loads(lines[0].removeprefix("transfers:"))
    return cases


@pytest.mark.long
@pytest.mark.parametrize("stage", [1, 2])
def test_micro_batches_are_copied_from_pinned_memory_and_not_read(
    found: list[dict[str, Any]], stage: int
) -> None:
    cases = [case for case in found if case["stage"] == stage]
    assert [case["micro_batches"] for case in cases] == [1, 3]
    per_micro_batch = COPIES + (COPIES_OF_WINDOWS if stage == 2 else 0)
    for case in cases:
        assert case["pageable"] == case["synchronized"] == {}
        assert sum(case["reads"].values()) == MEASURES + UPDATES, case["reads"]
        assert sum(case["pinned"].values()) == case["micro_batches"] * per_micro_batch
