"""csrc/ builds with nvcc for both GPU generations without spills, and is done without elsewhere."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kernels
from kernels import power_iteration_cuda

ROOT = Path(__file__).parents[1]
KERNELS = ("column_sums", "merge_columns", "row_sums", "finish")


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What `pip install` runs for csrc/, into `folder`."""
    command = ["build_ext", "--force", f"--build-lib={folder}", f"--build-temp={folder / 'temp'}"]
    return subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The library, and what was said while it was built."""
    folder = tmp_path_factory.mktemp("csrc")
    done = build(folder, NVCC_APPEND_FLAGS="-Xptxas=-v")
    said = done.stdout + done.stderr
    if "no nvcc found" in said:
        pytest.skip("no nvcc")
    return folder / "kernels" / power_iteration_cuda.LIBRARY.name, said


def test_no_kernel_spills_on_any_architecture(built: tuple[Path, str]) -> None:
    _, said = built
    compiled = re.findall(
        rf"Compiling entry function '\w+\d({'|'.join(KERNELS)})E\w+' for '(sm_\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers",
        said,
        re.DOTALL,
    )
    found = {(name, arch) for name, arch, *_ in compiled}
    assert found == {(name, arch) for name in KERNELS for arch in ("sm_80", "sm_90a")}
    for name, arch, *spilled, registers in compiled:
        assert spilled == ["0"] * 3, (name, arch)
        # 65536 registers per multiprocessor: two blocks of `finish`, four of the others.
        assert int(registers) <= 64, (name, arch)


LOADING = """
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels import power_iteration_cuda

power_iteration_cuda.LIBRARY = Path(sys.argv[1])
assert power_iteration_cuda.unavailable() is None
assert kernels.implementations("cuda")["power_iteration_"].implementation == "cuda"
with pytest.raises(kernels.ImplementationError, match="tensors are on cpu, not on CUDA"):
    kernels.power_iteration_([torch.randn(3, 4)], [torch.randn(3)], [torch.randn(4)], impl="cuda")
# Called past that check, it is torch's dispatcher that refuses.
tensors = [torch.zeros(1, 3)] * 7
with pytest.raises(NotImplementedError, match="'sswgan_csrc::power_iteration'"):
    torch.ops.sswgan_csrc.power_iteration(*tensors, [1, 1, 1, 1], 1, 0)
print("as it must")
"""


def test_the_library_loads_and_refuses_what_it_must(built: tuple[Path, str]) -> None:
    """Also into a torch without CUDA: it needs no library of CUDA's.

    In a process of its own: a second library that registers the operators ends a process, and the
    installed one may have been loaded into this.
    """
    library, _ = built
    done = subprocess.run(
        [sys.executable, "-c", LOADING, str(library)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "as it must\n"), done.stderr


def test_without_nvcc_one_line_says_so(tmp_path: Path) -> None:
    done = build(tmp_path, CUDA_HOME=str(tmp_path))
    lines = [line for line in done.stdout.splitlines() if "ssw-gan" in line]
    assert lines == ["ssw-gan: no nvcc found, csrc/ is not built; kernels run as Triton or PyTorch"]
    assert not list(tmp_path.glob("**/*.so"))


def test_a_compiler_that_fails_stops_no_installation(tmp_path: Path) -> None:
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "nvcc").write_text("#!/bin/sh\nexit 3\n")
    (home / "bin" / "nvcc").chmod(0o755)
    done = build(tmp_path, CUDA_HOME=str(home))
    assert "csrc/ is not built: " in done.stdout + done.stderr
    assert "exit status 3" in done.stdout + done.stderr
    assert not list(tmp_path.glob("**/*.so"))


@pytest.fixture
def no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    library = tmp_path / "_csrc.abi3.so"
    monkeypatch.setattr(power_iteration_cuda, "LIBRARY", library)
    power_iteration_cuda.unavailable.cache_clear()
    yield library
    power_iteration_cuda.unavailable.cache_clear()


def test_where_it_is_not_built_triton_runs(no_library: Path) -> None:
    pytest.importorskip("triton")
    choice = kernels.implementations("cuda")["power_iteration_"]
    assert choice.implementation == "triton"
    assert choice.reason == "not cuda: csrc/ is not built (setup.py builds it where it finds nvcc)"


def test_a_broken_library_is_told(no_library: Path) -> None:
    no_library.write_bytes(b"no library")
    reason = kernels.implementations("cuda")["power_iteration_"].reason
    assert reason.startswith("not cuda: _csrc.abi3.so does not load: ")
