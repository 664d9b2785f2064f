"""benchmarks/gpu_session.sh on a GPU that is pretended: its calls come to their end there.

With few channels; values and times are nobody's. What cannot be had there, as kernels' times and
NVDEC, must be recorded as failed, beside everything else.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pretended import why_not

from benchmarks.first_hour.parts import CallFile

REPOSITORY = Path(__file__).resolve().parents[2]
RUN = REPOSITORY / "benchmarks/pretended_gpu/run.py"
SCRIPT = "benchmarks/gpu_session.sh"

pytestmark = pytest.mark.slow


def rehearse(call: str, out: Path) -> dict[str, CallFile]:
    """What a call leaves, by the file's name."""
    if reason := why_not():
        pytest.skip(reason)
    shell = f"import os; os.execvp('bash', {['bash', SCRIPT, *call.split()]})"
    variables = {"OUT": str(out), "PYTHON": sys.executable, "SMALL": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(RUN), "-c", shell],
        env=os.environ | variables,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    files = {
        path.stem: CallFile.model_validate_json(path.read_text()) for path in out.glob("*.json")
    }
    assert files, done.stdout + done.stderr
    assert {file.device.name for file in files.values()} == {"pretended H100"}
    return files


def statuses(file: CallFile) -> dict[str, str]:
    """Of every part."""
    return {part.name: part.status for part in file.parts}


def test_versions(tmp_path: Path) -> None:
    found = statuses(rehearse("versions", tmp_path)["versions"])
    failed = {name for name, status in found.items() if status == "failed"}
    assert failed == {"NVDEC's library"} | {name for name in found if name.startswith("DALI")}
    assert set(found.values()) == {"done", "failed"}


def test_limits(tmp_path: Path) -> None:
    found = statuses(rehearse("limits", tmp_path)["limits"])
    assert len(found) == 7 * 2 * 2
    assert set(found.values()) == {"done"}


@pytest.mark.parametrize("setup", ["stage1", "stage2_generated"])
def test_steps(tmp_path: Path, setup: str) -> None:
    """All but kernels' times; networks of no values cannot be compared."""
    file = rehearse(f"steps {setup}", tmp_path)[f"steps-{setup}"]
    found = statuses(file)
    found.pop(f"{setup}: networks as plain ones")
    kernels = {name for name in found if name.endswith(": kernels")}
    assert len(kernels) == 2 * 2
    assert {name for name, status in found.items() if status != "done"} == kernels
    (waits,) = (part.value for part in file.parts if part.name == f"{setup}: waits")
    # In every update DeepSpeed brings a constant, reads it, and asks for the gradient's norm.
    assert sum(waits.values()) == 3 * 3 + 1


def test_profile_without_a_profiler(tmp_path: Path) -> None:
    file = rehearse("profile stage1", tmp_path)["profile-stage1"]
    (part,) = file.parts
    assert part.status == "failed"
    assert str(part.error).endswith("RuntimeError: the profiler recorded no kernel")


def test_plan(tmp_path: Path) -> None:
    """Two files; the second is of pytest's tests, which have the sizes of real networks."""
    files = rehearse("plan", tmp_path)
    assert set(statuses(files["memory"]).values()) == {"done"}
    assert len(files["memory"].parts) == 2 * 2 * 2
    assert set(statuses(files["plan-tests"]).values()) == {"done"}


def test_a_call_goes_on_where_it_was(tmp_path: Path) -> None:
    """A part that has begun is what the process died of: it is not tried again."""
    file = rehearse("versions", tmp_path)["versions"]
    packages, died, *others = file.parts
    begun = died.model_copy(update={"status": "begun", "value": None})
    left = file.model_copy(update={"parts": [packages, begun]})
    path = tmp_path / "versions.json"
    path.write_text(json.dumps(left.model_dump(mode="json")))
    again = rehearse("versions", tmp_path)["versions"]
    assert again.parts[:2] == [packages, begun]
    assert [part.name for part in again.parts[2:]] == [part.name for part in others]
