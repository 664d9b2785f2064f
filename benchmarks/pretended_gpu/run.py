"""Run Python on a pretended H100, which has memory and launches kernels that do nothing.

    V/bin/python benchmarks/pretended_gpu/run.py -m pytest -m gpu tests/kernels
    V/bin/python benchmarks/pretended_gpu/run.py benchmarks/pretended_gpu/host_time.py stage2_12

For whoever has no GPU and changes code that only a GPU runs. V is an environment with a CUDA
build of PyTorch (CONTRIBUTING.md makes one); needed besides are gcc, nm and CUDA's headers.

What is real: PyTorch and its caching allocator, Triton, which compiles every kernel for sm_90 and
launches it with its arguments and grid, DeepSpeed on its CUDA accelerator, streams, events and
captured graphs as the host sees them. So it finds arguments on the wrong device, launches that no
GPU takes, waiting while a graph is captured, memory that does not suffice; and it measures what an
iteration costs the host, how many kernels it launches, and how often the host would have to wait.

What is not: every value, so tests of values fail; every time but the host's. cuDNN's, cuBLAS's and
NCCL's calls return at once. The kernels of csrc/ are left out, since their CUDA runtime, linked
into them, knows better. Nothing that is measured here is a result of a GPU, and none of it goes
into benchmarks/results/.
"""

import ctypes
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARIES = "cublas|cusolver|cusparse|nccl"
HANDLES = (  # functions that make something, and put its handle where the first argument says
    "cublasCreate_v2",
    "cublasLtMatmulDescCreate",
    "cublasLtMatmulPreferenceCreate",
    "cublasLtMatrixLayoutCreate",
    "ncclCommInitRank",
    "ncclCommInitRankConfig",
)
NUMBERS = {  # functions that answer a number: where among the arguments, and which
    "ncclGetVersion": (0, 22800),
    "ncclCommCount": (1, 1),
    "ncclCommGetAsyncError": (1, 0),
    "cublasLtMatmulAlgoGetHeuristic": (9, 1),
}
TEXTS = ("ncclGetErrorString", "ncclGetLastError")
COPIES = ("ncclAllGather", "ncclAllReduce", "ncclReduceScatter", "ncclReduce", "ncclBroadcast")

WAITS = ("streams", "events", "devices", "copies")
"""What the host would wait for, as cuda.c numbers it: cudaStreamSynchronize and the like, copies.

A copy is from pageable memory to the device or back, or a cudaMemcpy with an end on the host. A
copy of PyTorch's that blocks is one of these and one of a stream.
"""


def stand_ins(torch_library: Path) -> str:
    """C for what PyTorch imports from CUDA's libraries: every call succeeds and does nothing."""
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", torch_library], check=True, capture_output=True, text=True
    ).stdout
    names = sorted(set(re.findall(rf"\b((?:{LIBRARIES})[A-Za-z0-9_]+)", listing)))
    lines = ["#include <string.h>"]
    arguments = ", ".join(f"void *a{place}" for place in range(10))
    for name in names:
        if name in TEXTS:
            lines.append(f'const char *{name}(void) {{ return ""; }}')
        elif name in COPIES:  # one rank: what comes out is what went in
            lines.append(
                f"int {name}(const void *from, void *to, unsigned long n, int type) {{"
                " static const int bytes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};"
                " memmove(to, from, n * bytes[type]); return 0; }"
            )
        elif name in HANDLES:
            lines.append(f"int {name}(void **made) {{ *made = (void *)32; return 0; }}")
        elif name in NUMBERS:
            place, number = NUMBERS[name]
            lines.append(f"int {name}({arguments}) {{ *(int *)a{place} = {number}; return 0; }}")
        else:
            lines.append(f"int {name}(void) {{ return 0; }}")
    return "\n".join(lines)


def build(folder: Path) -> Path:
    """The library that stands for libcuda.so.1 and is loaded before all others."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit("error: PyTorch is not installed for this Python")
    torch_library = Path(spec.origin).parent / "lib/libtorch_cuda.so"
    if not torch_library.is_file():
        sys.exit("error: this PyTorch was built without CUDA; CONTRIBUTING.md makes an environment")
    headers = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
    if not (headers / "cuda.h").is_file():
        sys.exit(f"error: no CUDA headers in {headers}; set CUDA_HOME")
    sources = folder / "stand_ins.c"
    sources.write_text(stand_ins(torch_library))
    library = folder / "libcuda.so.1"
    options = ["-shared", "-fPIC", "-O1", "-w", f"-I{headers}", "-Wl,-soname,libcuda.so.1"]
    files = [HERE / "cuda.c", sources]
    subprocess.run(["gcc", *options, "-o", library, *files, "-ldl", "-lpthread"], check=True)
    return library


def launches() -> tuple[int, int]:
    """So far in this process: PyTorch's kernels, and Triton's."""
    process = ctypes.CDLL(None)
    return process.pretended_launches(), process.pretended_triton_launches()


@contextmanager
def watched_waits() -> Iterator[Counter[str]]:
    """Within this context, what kind of wait happened where: "copies module.py:12 ..." → times.

    Where: the innermost lines of Python outside of PyTorch, the innermost first.
    """
    found: Counter[str] = Counter()

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def note(kind: int) -> None:
        frames = [f for f in traceback.extract_stack()[:-1] if "/torch/" not in f.filename]
        lines = [f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames[-3:])]
        found[" ".join([WAITS[kind], *lines])] += 1

    process = ctypes.CDLL(None)
    process.pretended_on_wait(note)
    try:
        yield found
    finally:
        process.pretended_on_wait(None)


def main() -> None:
    """Build, then become the Python that was asked for."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    folder = Path(tempfile.mkdtemp(prefix="pretended-gpu-"))
    library = build(folder)
    paths = [HERE / "startup", HERE.parents[1], *sys.path[1:]]
    environment = os.environ | {
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_LIBCUDA_PATH": str(folder),
        "PYTHONPATH": os.pathsep.join(str(path) for path in paths if path),
        "PYTEST_PLUGINS": "without_checks",
        # What a failed test shows of tensors without values may never end.
        "PYTEST_ADDOPTS": f"--assert=plain --tb=short {os.environ.get('PYTEST_ADDOPTS', '')}",
        "DS_ACCELERATOR": "cuda",
        # What is compiled for other convolutions than these must not be taken for it.
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
    }
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], environment)


if __name__ == "__main__":
    main()
