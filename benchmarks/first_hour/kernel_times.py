"""A GPU's kernels in a run: which take the longest, and whether their names say why."""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from engine.trainer.profiling.trace_file import exported

NAME_LENGTH = 200  # templates' names are longer than anyone reads

_ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
_PRODUCT = re.compile(r"gemm|fprop|dgrad|wgrad|cutlass|xmma|conv[23]d", re.IGNORECASE)
_OLDER_GPU = re.compile(r"sm_?[5-8]\d|volta|turing|ampere", re.IGNORECASE)
_THIS_GPU = re.compile(r"sm_?90|hopper|nvjet", re.IGNORECASE)
_SLOW_NAMES = {
    "implicit_convolve": "cuDNN's fallback, without tensor cores",
    "direct": "a direct convolution, without tensor cores",
    "nchwtonhwc": "a copy into another layout",
    "nhwctonchw": "a copy into another layout",
    "im2col": "PyTorch's own convolution, by copies",
    "slow_conv": "PyTorch's own convolution, by copies",
    "conv_depthwise": "PyTorch's own convolution",
}


class Kernel(NamedTuple):
    """All runs of one kernel, copy or fill."""

    name: str
    seconds: float
    launches: int


def kernels_of(run: Callable[[], object]) -> list[Kernel]:
    """Of one run on the current GPU, the longest first; they are not counted side by side.

    Raises RuntimeError where the profiler sees none.
    """
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        run()
        torch.cuda.synchronize()
    found = summed(exported(profiler, Path("trace.json"))["traceEvents"])
    if not found:
        raise RuntimeError("the profiler recorded no kernel")
    return found


def summed(events: Sequence[dict[str, Any]]) -> list[Kernel]:
    """Kernels, copies and fills of a Chrome trace, the longest first."""
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") in _ON_DEVICE:
            seconds[event["name"]].append(float(event["dur"]) / 1e6)
    kernels = [Kernel(name, sum(taken), len(taken)) for name, taken in seconds.items()]
    return sorted(kernels, key=lambda kernel: -kernel.seconds)


def described(kernel: Kernel, total_seconds: float) -> dict[str, Any]:
    """For a call's file, with its share of all kernels' time."""
    return {
        "name": kernel.name[:NAME_LENGTH],
        "seconds": kernel.seconds,
        "launches": kernel.launches,
        "share": kernel.seconds / total_seconds,
        "slow_path": slow_path(kernel.name),
    }


def slow_path(name: str) -> str | None:
    """What a kernel's name says against it on a Hopper GPU; None where it says nothing."""
    lower = name.lower()
    if "elementwise" in lower:  # among them PyTorch's direct_copy_kernel
        return None
    for part, reason in _SLOW_NAMES.items():
        if part in lower:
            return reason
    if _PRODUCT.search(name) and not _THIS_GPU.search(name):
        return "made for an older GPU" if _OLDER_GPU.search(name) else "not made for sm_90 by name"
    return None
