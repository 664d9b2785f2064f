"""What there is: packages, device, decoders, and which implementation every operator runs."""

import ctypes
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import kernels
from benchmarks import results
from benchmarks.first_hour.parts import Part
from benchmarks.setups import Scale

PACKAGES = ("deepspeed", "pydantic", "numpy", "av", "nvidia-ml-py", "nvidia-dali-cuda130")
DTYPES = (torch.bfloat16, torch.float32)


def versions(scale: Scale, names: tuple[str, ...]) -> Iterator[Part]:
    """Nothing is trained; a few frames are decoded."""
    found = {name: results.version_of(name) for name in PACKAGES}  # None: it is not installed
    yield Part("packages", lambda: results.these_versions() | found)
    yield Part("device", partial(device, scale))
    yield Part("operators", partial(operators, scale.device))
    yield Part("NVDEC's library", nvdec_library)
    for codec in ("h264", "vp9", "mjpeg"):
        yield Part(f"DALI decodes {codec}", partial(dali_decodes, codec, scale))


def device(scale: Scale) -> dict[str, Any]:
    """The GPU's name, driver, size and free memory in bytes."""
    scale.require_gpu()
    properties = torch.cuda.get_device_properties(scale.device)
    free, total = torch.cuda.mem_get_info(scale.device)
    return results.this_device().model_dump() | {
        "capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "total_bytes": total,
        "free_bytes": free,
    }


def operators(where: torch.device) -> dict[str, dict[str, list[str]]]:
    """By dtype and operator: the implementation, and why it is that one."""
    return {
        str(dtype).removeprefix("torch."): {
            name: [choice.implementation, choice.reason]
            for name, choice in kernels.implementations(where, dtype).items()
        }
        for dtype in DTYPES
    }


def nvdec_library() -> str:
    """The driver's decoding library loads, which not every container has."""
    ctypes.CDLL("libnvcuvid.so.1")
    return "libnvcuvid.so.1"


def dali_decodes(codec: str, scale: Scale) -> str:
    """Two frames of a video, within a few levels of PyAV's. Raises RuntimeError with DALI's."""
    from benchmarks.loading import write_video
    from engine.video.decoder_choice import obstacle, try_dali

    scale.require_gpu()
    with tempfile.TemporaryDirectory() as folder:
        index = write_video(Path(folder), codec, 128, 128, 20)
        reason = obstacle(index.entries[0], "dali-gpu") or try_dali(index, "dali-gpu", scale.device)
    if reason:
        raise RuntimeError(reason)
    return "as PyAV, to a few levels"
