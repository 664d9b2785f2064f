"""The libraries that setup.py builds from csrc/ into kernels/, where it finds the compilers.

They need nothing of Python and no particular torch: they are registered through libtorch's stable
ABI.
"""

import functools
from pathlib import Path

import torch

_KERNELS = Path(__file__).parent.parent
CUDA = _KERNELS / "_csrc.abi3.so"
CPU = _KERNELS / "_csrc_cpu.abi3.so"


@functools.cache
def unavailable(library: Path) -> str | None:
    """Why a library is not there; None where it is, and then it is loaded."""
    if not library.exists():
        compiler = "nvcc" if library.name == CUDA.name else "a C++ compiler"
        return f"csrc/ is not built (setup.py builds it where it finds {compiler})"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library.name} does not load: {error}"
    return None
