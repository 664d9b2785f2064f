"""What is measured first on a GPU: its files say of every part what became of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from result_files import document
from small_runs import REPOSITORY, environment

from benchmarks import merge, report, results
from benchmarks.first_hour import __main__ as first_hour
from benchmarks.first_hour import operators
from benchmarks.first_hour.kernel_times import Kernel, slow_path, summed
from benchmarks.first_hour.parts import START_AGAIN, CallFile, Part, Recorder
from benchmarks.results import Document
from benchmarks.setups import SETUPS, Scale
from engine.errors import UserError

SMALL = Scale(torch.device("cpu"), small=True)
SCRIPT = REPOSITORY / "benchmarks/gpu_session.sh"


def read(path: Path) -> dict[str, tuple[str, Any]]:
    """Of every part: its status, and its value or error."""
    file = CallFile.model_validate_json(path.read_text())
    return {part.name: (part.status, part.value or part.error) for part in file.parts}


# --------------------------------------------------------------------------------- parts


def wrong() -> None:
    raise ValueError("values\nare wrong")


def test_a_part_that_fails_leaves_the_others_alone(tmp_path: Path) -> None:
    path = tmp_path / "call.json"
    parts = [Part("one", lambda: {"n": 1}), Part("two", wrong), Part("three", lambda: 3)]
    assert Recorder(path, "call", small=True).run(parts) == 0
    found = read(path)
    assert found["one"] == ("done", {"n": 1})
    assert found["three"] == ("done", 3)
    status, error = found["two"]
    assert status == "failed"
    assert error.endswith("ValueError: values\nare wrong")


def test_what_json_cannot_hold_is_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "call.json"
    parts = [Part("tensor", lambda: torch.ones(1)), Part("nan", lambda: float("nan"))]
    Recorder(path, "call", small=True).run(parts)
    assert [status for status, _ in read(path).values()] == ["failed", "failed"]


def test_no_part_begins_when_the_time_is_up(tmp_path: Path) -> None:
    path = tmp_path / "call.json"
    Recorder(path, "call", small=True, budget=-1).run([Part("one", wrong)])
    assert read(path) == {"one": ("left out", "the time was up")}


def test_a_call_goes_on_behind_what_its_process_died_of(tmp_path: Path) -> None:
    path = tmp_path / "call.json"
    script = """
import os, sys
from pathlib import Path
from benchmarks.first_hour.parts import Part, Recorder
parts = [Part("one", lambda: os.getpid()), Part("two", lambda: os.abort()), Part("three", list)]
sys.exit(Recorder(Path(sys.argv[1]), "call", small=True).run(parts))
"""
    command = [sys.executable, "-c", script, str(path)]
    first = subprocess.run(command, env=environment(), capture_output=True, check=False)
    assert first.returncode < 0
    before = read(path)
    assert before["two"] == ("begun", None)
    assert "three" not in before
    subprocess.run(command, env=environment(), capture_output=True, check=True)
    assert read(path) == before | {"three": ("done", None)}
    other = CallFile.model_validate_json(path.read_text()).model_copy(update={"commit": "other"})
    path.write_text(other.model_dump_json())
    Recorder(path, "call", small=True).run([Part("four", list)])
    assert list(read(path)) == ["four"], "of another commit: nothing to go on with"


def test_a_lost_context_asks_for_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, run = tmp_path / "call.json", "benchmarks.first_hour.parts"
    monkeypatch.setattr(f"{run}.context_is_whole", lambda: False)
    parts = [Part("one", wrong), Part("two", list)]
    assert Recorder(path, "call", small=True).run(parts) == START_AGAIN
    monkeypatch.undo()
    assert Recorder(path, "call", small=True).run(parts) == 0
    assert [status for status, _ in read(path).values()] == ["failed", "done"]


# --------------------------------------------------------------------------------- tests

TESTS = """
import os
import pytest
def test_right(): pass
def test_wrong(): assert 1 == 2
@pytest.mark.skip(reason="not here")
def test_skipped(): pass
def test_dies():
    os.abort()
def test_behind(): pass
"""


@pytest.mark.long
def test_tests_are_recorded_while_others_run(tmp_path: Path) -> None:
    file, path = tmp_path / "test_some.py", tmp_path / "some.json"
    file.write_text(TESTS)
    plugin = ("-p", "benchmarks.first_hour.outcomes", "--outcomes", str(path))
    command = [sys.executable, "-m", "pytest", "-q", "--rootdir", str(tmp_path), *plugin, str(file)]
    codes = [
        subprocess.run(command, env=environment(), capture_output=True, check=False).returncode
        for _ in range(3)
    ]
    assert codes[0] < 0
    assert codes[1:] == [0, 0], "what is recorded does not run again"
    found = {name.partition("::")[2]: outcome for name, outcome in read(path).items()}
    status, error = found.pop("test_wrong")
    assert status == "failed"
    assert "assert 1 == 2" in error
    assert found.pop("test_skipped") == ("left out", "Skipped: not here")
    assert found == {
        "test_right": ("done", None),
        "test_dies": ("begun", None),
        "test_behind": ("done", None),
    }


# --------------------------------------------------------------------------------- calls


def test_versions_without_a_gpu(tmp_path: Path) -> None:
    assert first_hour.main(["versions", "--out", str(tmp_path), "--small"]) == 0
    found = read(tmp_path / "versions.json")
    assert found["packages"][1]["torch"] == torch.__version__
    assert set(found["operators"][1]) == {"bfloat16", "float32"}
    if not torch.cuda.is_available():
        assert found["device"][0] == "failed"
        assert found["DALI decodes h264"] == (
            "failed",
            found["device"][1],
        )


def test_convolutions_that_pass_the_limit() -> None:
    """The ConvGRU's gates at 32x32 and stage 2's convolutions at 128x128: 3 * 512 and 128 channels,
    25 and 12 frames."""
    found = {limited.name: limited for limited in operators.passing(SMALL)}
    gates = found["conv_gru 1x25x512x32x32"]
    assert gates.values_per_sample == 3 * 512 * 25 * 32 * 32
    assert gates.sizes() == (54, 55, 64)
    last = [limited for name, limited in found.items() if "x128x128x128-" in name]
    assert [limited.sizes() for limited in last] == [(85, 86, 128)] * 2
    assert found["upsample_conv 1x12x256x64x64-128"].sizes() == (85, 86, 128)
    for limited in found.values():
        below, above, _ = limited.sizes()
        assert below * limited.values_per_sample < 1 << 31 <= above * limited.values_per_sample


@pytest.mark.slow
@pytest.mark.parametrize("side", ["torch", "kernels"])
def test_limits_are_timed(side: str) -> None:
    for limited in operators.passing(SMALL):
        found = operators.time_per_sample(SMALL, limited, 1, side)
        assert found["forward_backward_ms"] > found["forward_ms"] > 0
        assert found["values"] < limited.values_per_sample


def test_the_largest_sizes_need_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(RuntimeError, match="--small"):
        first_hour.main(["versions", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        first_hour.main(["steps", "stage9", "--out", str(tmp_path), "--small"])


@pytest.mark.long
def test_steps_without_a_gpu(tmp_path: Path) -> None:
    """Networks are compared and iterations run; what only a GPU tells fails by itself."""
    command = [sys.executable, "-m", "benchmarks.first_hour", "steps", "stage1", "--small"]
    subprocess.run(
        [*command, "--out", str(tmp_path)],
        env=environment() | {"CUDA_VISIBLE_DEVICES": ""},
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
    )
    found = read(tmp_path / "steps-stage1.json")
    assert found["stage1: networks as plain ones"][0] == "done"
    assert found["stage1: FLOPs"][1]["tflop_per_sample"] > 0
    assert set(found["stage1: an iteration"][1]) == {"first", "second"}
    without = "RuntimeError: there is no CUDA device"
    timed = {name: outcome for name, outcome in found.items() if "samples" in name}
    assert len(timed) == 2 * 2 * 2
    assert all(status == "failed" and without in error for status, error in timed.values())


# ----------------------------------------------------------------------------- the script


def commands(*arguments: str, **variables: str) -> list[str]:
    """What a call of the script would run."""
    done = subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env=os.environ | {"DRY": "1", "OUT": "folder", "PYTHON": sys.executable} | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line[2:] for line in done.stdout.splitlines() if line.startswith("+ ")]
    return [line for line in lines if sys.executable in line and "setup.py" not in line]


CALLS = {
    "versions": 1,
    "limits": 1,
    "correctness": 3,
    "steps": 1,
    "steps stage1": 1,
    "profile": 1,
    "plan": 2,
    "decoders": 2,
    "large": 1,
    "operators 1": 1,
    "operators 2": 1,
    "operators 3": 1,
    "iterations stage1 stage2_12": 1,
    "compiled dvdgan_50": 1,
    "merge a.json b.json": 1,
}


@pytest.mark.parametrize("call", CALLS)
def test_every_call_has_its_commands_and_ends_in_time(call: str) -> None:
    found = commands(*call.split())
    assert len(found) == CALLS[call], found
    if not call.startswith("merge"):
        limits = [int(line.split(" -s INT ")[1].split()[0]) for line in found]
        assert sum(limits) <= 480


def test_what_the_script_asks_of_python_is_known() -> None:
    """Calls, setups, files and folders; a small one is asked for throughout."""
    for call in CALLS:
        for line in commands(*call.split(), SMALL="1"):
            words = line.split()
            if "benchmarks.first_hour" in words:
                asked = first_hour.parse(words[words.index("benchmarks.first_hour") + 1 :])
                assert asked.small
                assert asked.out == Path("folder")
                assert asked.setups == [word for word in call.split()[1:] if word in SETUPS]
            for word in words:
                if word.endswith(".py") or word.startswith("tests/"):
                    assert (REPOSITORY / word).exists(), line
                if word.startswith(("stage", "dvdgan")):
                    assert word.rstrip(")") in SETUPS


def test_a_call_that_does_not_exist_shows_those_that_do() -> None:
    done = subprocess.run(
        ["bash", str(SCRIPT), "nonsense"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "gpu_session.sh versions" in done.stderr


# ------------------------------------------------------------------------------- results


def call_file(**changes: Any) -> dict[str, Any]:
    """A GPU's, of stage 1 at 4, 8 and 32 samples."""
    like = Document.model_validate(document())
    gib = 1 << 30
    attempts = [
        {
            "kind": "iteration",
            "setup": "stage1",
            "build": "ours",
            "samples": samples,
            "seconds": [seconds, seconds, seconds],
            "peak_bytes": peak,
        }
        for samples, seconds, peak in ((4, 0.4, 20 * gib), (8, 0.6, 40 * gib), (32, 2.0, 70 * gib))
    ]
    values = [
        {"kind": "rates", **like.rates[0].model_dump()},
        {"kind": "flops", "setup": "stage1", "tflop_per_sample": 20.0},
        *attempts,
    ]
    parts = [
        {"name": f"part {n}", "status": "done", "seconds": 1.5, "value": value}
        for n, value in enumerate(values)
    ]
    parts.append({"name": "networks", "status": "failed", "error": "Refused: D's scores differ"})
    fixed = json.loads(
        like.model_dump_json(include={"device", "versions", "commit", "dirty", "date"})
    )
    return fixed | {"call": "steps", "small": False, "parts": parts} | changes


def test_a_calls_file_fills_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = tmp_path / "steps.json", tmp_path / "operators.json"
    one.write_text(json.dumps(call_file()))
    other.write_text(json.dumps(document()))
    merge.main([str(one), str(other), "--results", str(tmp_path / "merged")])
    (merged,) = (tmp_path / "merged").glob("*.json")
    (step,) = results.read(merged).steps
    assert step.usual.samples == 4
    assert step.best is not None
    assert step.best.samples == 32  # 62.5 ms per sample, beside 100 and 75
    # 8 samples do not fit into 32 GB; 16 were not tried, so nobody knows of 80 GB.
    assert step.fits == {"32 GB": 4, "80 GB": None}
    assert step.matmul_tflop_per_s == results.read(other).rates[0].matmul_tflop_per_s
    capsys.readouterr()
    report.main([str(merged)])
    shown = capsys.readouterr().out
    assert "| stage 1 32x32/25 | this engine | 4 |  | 21475 at 4 | 0.4 | 2 of 32 | 62.5 |" in shown
    assert "**Refused or broken:** steps: networks." in shown
    assert "frame_norm" in shown


def test_what_measured_nothing_is_no_result(tmp_path: Path) -> None:
    path = tmp_path / "steps.json"
    path.write_text(json.dumps(call_file(small=True)))
    with pytest.raises(UserError, match="--small"):
        merge.main([str(path), "--results", str(tmp_path)])
    like = Document.model_validate(document())
    pretended = like.model_copy(
        update={"device": like.device.model_copy(update={"name": "pretended H100"})}
    )
    with pytest.raises(UserError, match="no device"):
        results.write(pretended, results.FOLDER)
    path.write_text("[]")
    with pytest.raises(UserError, match=r"steps\.json"):
        merge.main([str(path), "--results", str(tmp_path)])


# ------------------------------------------------------------------------- kernels' names


@pytest.mark.parametrize(
    ("name", "slow"),
    [
        ("void implicit_convolve_sgemm<__nv_bfloat16, 128, 5, 5, 3, 3>(int)", True),
        ("void cudnn::cnn::conv2d_grouped_direct_kernel<float>(x)", True),
        ("void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, float>(x)", True),
        ("sm80_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128", True),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128", False),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", False),
        ("cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_nn_align8", True),
        ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda(x)>(int)", False),
        ("normalize_kernel", False),
        ("convolve_kernel", False),
        ("void at::native::reduce_kernel<512, 1, at::native::MeanOps<float> >(x)", False),
    ],
)
def test_names_tell_of_slow_paths(name: str, slow: bool) -> None:
    assert (slow_path(name) is not None) is slow, slow_path(name)


def test_kernels_are_summed() -> None:
    events: list[dict[str, Any]] = [
        {"cat": "kernel", "name": "a", "dur": 2},
        {"cat": "cpu_op", "name": "a", "dur": 1000},
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD", "dur": 5.5},
        {"cat": "kernel", "name": "a", "dur": 4},
        {"name": "without a kind"},
    ]
    assert summed(events) == [Kernel("a", 6e-6, 2), Kernel("Memcpy HtoD", 5.5e-6, 1)]
