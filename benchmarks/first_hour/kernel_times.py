"""A GPU's kernels in a run: how long they take together, and which take the longest."""

import json
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

_ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
_PRODUCT = re.compile(r"gemm|fprop|dgrad|wgrad|cutlass|xmma|conv[23]d", re.IGNORECASE)
_OLDER_GPU = re.compile(r"sm_?[5-8]\d|volta|turing|ampere", re.IGNORECASE)
_THIS_GPU = re.compile(r"sm_?90|hopper|nvjet", re.IGNORECASE)
_SLOW_NAMES = (
    ("implicit_convolve", "cuDNN's fallback, without tensor cores"),
    ("direct", "a direct convolution, without tensor cores"),
    ("nchwtonhwc", "a copy into another layout"),
    ("nhwctonchw", "a copy into another layout"),
    ("im2col", "PyTorch's own convolution, by copies"),
    ("slow_conv", "PyTorch's own convolution, by copies"),
    ("conv_depthwise", "PyTorch's own convolution"),
)


class Kernel(NamedTuple):
    """All runs of one kernel."""

    name: str
    seconds: float
    launches: int


class Kernels(NamedTuple):
    """Of one run."""

    wall_seconds: float
    """From the first launch until the device has nothing left to do, under the profiler."""
    kernels: list[Kernel]
    """The longest first."""

    @property
    def seconds(self) -> float:
        """All together; they are not counted side by side."""
        return sum(kernel.seconds for kernel in self.kernels)

    @property
    def launches(self) -> int:
        """Of kernels, copies and fills."""
        return sum(kernel.launches for kernel in self.kernels)


def kernels_of(run: Callable[[], object]) -> Kernels:
    """Of one run on the current GPU. Raises RuntimeError where the profiler sees none."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        wall_seconds = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    found = summed(events)
    if not found:
        raise RuntimeError("the profiler recorded no kernel")
    return Kernels(wall_seconds, found)


def summed(events: Sequence[dict[str, Any]]) -> list[Kernel]:
    """Kernels, copies and fills of a Chrome trace, the longest first."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") in _ON_DEVICE:
            seconds[event["name"]].append(float(event["dur"]) / 1e6)
    kernels = [Kernel(name, sum(taken), len(taken)) for name, taken in seconds.items()]
    return sorted(kernels, key=lambda kernel: -kernel.seconds)


def slow_path(name: str) -> str | None:
    """What a kernel's name says against it on a Hopper GPU; None where it says nothing."""
    lower = name.lower()
    if "elementwise" in lower:  # among them PyTorch's direct_copy_kernel
        return None
    for part, reason in _SLOW_NAMES:
        if part in lower:
            return reason
    if _PRODUCT.search(name) and not _THIS_GPU.search(name):
        return "made for an older GPU" if _OLDER_GPU.search(name) else "not made for sm_90 by name"
    return None
