"""Where a training iteration makes the host wait for a GPU, on a GPU that is pretended.

It needs a CUDA build of PyTorch, as CONTRIBUTING.md makes one, and no GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pretended import why_not

HERE = Path(__file__).resolve().parent
RUN = HERE.parents[1] / "benchmarks/pretended_gpu/run.py"

# Reading the measures: a copy to the host, and the wait for it.
MEASURES = 2
# In each of three updates it reads the gradient's norm, and brings it a constant.
DEEPSPEED = 3 * 4
EXPECTED = {"ZeRO-1": MEASURES + DEEPSPEED, "ZeRO-0": MEASURES, "CUDA graphs": MEASURES}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """See iteration_waits.py."""
    if reason := why_not():
        pytest.skip(reason)
    data = tmp_path_factory.mktemp("waits")
    done = subprocess.run(
        [sys.executable, str(RUN), str(HERE / "iteration_waits.py"), str(data)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("waits:")]
    assert lines, done.stdout + done.stderr
    cases: list[dict[str, Any]] = json.loads(lines[0].removeprefix("waits:"))
    return cases


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("settings", EXPECTED)
def test_the_host_waits_as_often_for_many_micro_batches_as_for_one(
    found: list[dict[str, Any]], settings: str, stage: int
) -> None:
    cases = [case for case in found if (case["settings"], case["stage"]) == (settings, stage)]
    assert [case["micro_batches"] for case in cases] == [1, 3]
    for case in cases:
        assert case["waits"] == EXPECTED[settings], "\n".join(
            f"{count} {place}" for place, count in case["where"].items()
        )
