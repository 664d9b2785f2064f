"""csrc/ builds: for a CPU, and with nvcc for both GPU generations without spills.

Where there is no compiler it is done without.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kernels
from kernels.common import csrc_libraries

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
    done = build(folder, NVCC_APPEND_FLAGS="-Xptxas=-v", CXX="")
    said = done.stdout + done.stderr
    if "no nvcc found" in said:
        pytest.skip("no nvcc")
    return folder / "kernels" / csrc_libraries.CUDA.name, said


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
from kernels.common import csrc_libraries

csrc_libraries.CUDA = Path(sys.argv[1])
assert csrc_libraries.unavailable(csrc_libraries.CUDA) is None
assert kernels.implementations("cuda")["power_iteration_"].implementation == "cuda"
with pytest.raises(kernels.ImplementationError, match="tensors are on cpu, not on CUDA"):
    vectors = [torch.randn(3)], [torch.randn(4)]
    kernels.power_iteration_([torch.randn(3, 4)], *vectors, implementation="cuda")
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


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_library_for_a_cpu_builds_without_a_warning(tmp_path: Path) -> None:
    done = build(tmp_path, CUDA_HOME=str(tmp_path), CXX="c++ -Werror")
    assert "warning" not in done.stdout + done.stderr
    assert (tmp_path / "kernels" / csrc_libraries.CPU.name).exists()


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_library_for_a_cpu_is_there() -> None:
    """Else its tests would be left out, and nobody would know."""
    assert csrc_libraries.unavailable(csrc_libraries.CPU) is None


def test_without_a_compiler_one_line_says_so(tmp_path: Path) -> None:
    older = tmp_path / "kernels" / csrc_libraries.CPU.name
    older.parent.mkdir()
    older.touch()
    done = build(tmp_path, CUDA_HOME=str(tmp_path), CXX="no-such-compiler")
    assert [line for line in done.stdout.splitlines() if "ssw-gan" in line] == [
        "ssw-gan: no C++ compiler found, kernels._csrc_cpu is not built; PyTorch runs on CPUs",
        "ssw-gan: no nvcc found, kernels._csrc is not built; Triton or PyTorch runs on GPUs",
    ]
    assert not list(tmp_path.glob("**/*.so"))


def test_a_compiler_that_fails_stops_no_installation(tmp_path: Path) -> None:
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    compiler = home / "bin" / "nvcc"
    compiler.write_text("#!/bin/sh\nexit 3\n")
    compiler.chmod(0o755)
    for library in (csrc_libraries.CPU, csrc_libraries.CUDA):
        older = tmp_path / "kernels" / library.name
        older.parent.mkdir(exist_ok=True)
        older.touch()
    done = build(tmp_path, CUDA_HOME=str(home), CXX=str(compiler))
    assert (done.stdout + done.stderr).count("csrc/ is not built: ") == 2
    assert "exit status 3" in done.stdout + done.stderr
    # Nor is an older one left, which would go on running instead of what csrc/ now says.
    assert not list(tmp_path.glob("**/*.so"))


@pytest.fixture
def no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    library = tmp_path / "_csrc.abi3.so"
    monkeypatch.setattr(csrc_libraries, "CUDA", library)
    return library


def test_where_it_is_not_built_triton_runs(no_library: Path) -> None:
    pytest.importorskip("triton")
    choice = kernels.implementations("cuda")["power_iteration_"]
    assert choice.implementation == "triton"
    assert choice.reason == "not cuda: csrc/ is not built (setup.py builds it where it finds nvcc)"


def test_a_broken_library_is_told(no_library: Path) -> None:
    no_library.write_bytes(b"no library")
    reason = kernels.implementations("cuda")["power_iteration_"].reason
    assert reason.startswith("not cuda: _csrc.abi3.so does not load: ")
