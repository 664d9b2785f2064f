"""The implementations of Adam that `training.adam` chooses from, and whether one can run here.

All are one algorithm with the same settings, fused over a network's weights. PyTorch's is on every
device, DeepSpeed's is compiled on first use, and NVIDIA Apex's has to be installed. With
`training.offload_optimizer` Adam runs on the CPU: PyTorch's is the same one, and DeepSpeed has a
CPU Adam.

PyTorch builds an extension, such as DeepSpeed's Adam, under a lock: a file that it makes, keeps
open and removes. A process that is killed meanwhile leaves the file, and all later ones would wait
for it, silently and for ever; `check_build_lock` refuses that.
"""

import os
import shutil
import time
from collections.abc import Iterable
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.configuration import Training
from engine.errors import UserError

EPSILON = 1e-8
APEX = "NVIDIA's is built from source, with its CUDA extensions: https://github.com/NVIDIA/apex"
OTHER_NODES_SECONDS = 120
"""How old a lock may be that no process of this machine holds: nodes may share a home folder."""


def whose_adam(training: Training) -> str:
    """torch, deepspeed or apex: what `auto` stands for."""
    return "torch" if training.adam == "auto" else training.adam


def check_adam(training: Training, device: torch.device) -> None:
    """UserError, in one line, when the configured Adam cannot run on this machine.

    Imports neither DeepSpeed, which is slow, nor Apex, which may be somebody else's.
    """
    offload = training.offload_optimizer
    if offload and training.zero_stage == 0:
        raise UserError(
            "training.offload_optimizer moves what ZeRO shards, and zero_stage is 0; "
            "set training.zero_stage=1, or 2 or 3"
        )
    whose = whose_adam(training)
    if whose == "torch":
        return
    if whose == "apex" and offload:
        raise UserError(
            "training.adam=apex runs on GPUs only, and training.offload_optimizer wants the CPU; "
            "set training.adam=auto"
        )
    if whose == "apex":
        _check_apex()
    if device.type != "cuda" and not offload:
        raise UserError(f"training.adam={whose} needs a GPU; set training.adam=auto")
    if whose == "deepspeed":
        _check_compiler(offload)


def make_adam(
    parameters: Iterable[nn.Parameter], *, lr: float, training: Training
) -> torch.optim.Optimizer:
    """The configured Adam; `check_adam` has found that it can run."""
    # ZeRO lays the weights out one behind the other. After one whose size is odd all would lie off
    # the 16 bytes at which kernels read four values at once: such go last.
    parameters = sorted(parameters, key=lambda parameter: parameter.numel() % 4 != 0)
    betas = training.adam_betas
    whose = whose_adam(training)
    if whose == "torch":
        return torch.optim.Adam(parameters, lr, betas, EPSILON, fused=True)
    # The others are AdamW unless told otherwise: the same without weight decay, but say so.
    if whose == "apex":
        apex: Any = import_module("apex.optimizers")  # which type checkers cannot see
        return apex.FusedAdam(parameters, lr=lr, betas=betas, eps=EPSILON, adam_w_mode=False)
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    if training.offload_optimizer:
        return DeepSpeedCPUAdam(parameters, lr=lr, betas=betas, eps=EPSILON, adamw_mode=False)
    return FusedAdam(parameters, lr=lr, betas=betas, eps=EPSILON, adam_w_mode=False)


def _check_apex() -> None:
    """Apex by what is in it: an unrelated package of the same name is on the package index."""
    spec = find_spec("apex")
    if spec is None:
        raise UserError(f"training.adam=apex: apex is not installed; {APEX}")
    if PathFinder.find_spec("apex.optimizers", spec.submodule_search_locations) is None:
        try:
            found = version("apex")
        except PackageNotFoundError:
            found = "of no known version"
        raise UserError(
            f"training.adam=apex: the installed apex ({found}, from the package index) is an "
            f"unrelated project; {APEX}"
        )
    if find_spec("amp_C") is None:
        raise UserError(
            f"training.adam=apex: the installed apex lacks the CUDA extension amp_C; {APEX}"
        )


def _check_compiler(offload: bool) -> None:
    """DeepSpeed compiles its Adams when they are first used, unless it was installed with them."""
    op = "cpu_adam_op" if offload else "fused_adam_op"
    spec = find_spec("deepspeed")
    for folder in (spec and spec.submodule_search_locations) or ():
        if any(Path(folder, "ops", "adam").glob(f"{op}*.so")):
            return
    cuda_home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    compiler = os.environ.get("CXX", "c++") if offload else "nvcc"
    needed = {
        compiler: shutil.which(compiler) or (not offload and Path(cuda_home, "bin/nvcc").is_file()),
        "ninja": shutil.which("ninja"),
    }
    missing = [program for program, found in needed.items() if not found]
    if missing:
        raise UserError(
            f"training.adam=deepspeed is compiled on first use and needs {' and '.join(missing)}: "
            "install it and put it on PATH, or set training.adam=auto"
        )
    check_build_lock("cpu_adam" if offload else "fused_adam")


def check_build_lock(operator: str) -> None:
    """UserError, in one line, where DeepSpeed's `operator` is locked by a build that was killed."""
    from torch.utils.cpp_extension import _get_build_directory  # slow

    lock = Path(_get_build_directory(operator, False), "lock")
    while (age := _age(lock)) is not None and not _is_open(lock):
        if age > OTHER_NODES_SECONDS:
            raise UserError(
                f"{lock} is left of a build that was killed, and nothing can be built until it is "
                "gone: remove it"
            )
        time.sleep(1)


def _age(path: Path) -> float | None:
    """Seconds, or None where there is no such file."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return None


def _is_open(path: Path) -> bool:
    """Whether a process of this machine has it open, as far as this user may see."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            with os.scandir(process / "fd") as descriptors:
                if any(os.readlink(descriptor.path) == str(path) for descriptor in descriptors):
                    return True
        except OSError:  # it ended, or is another user's
            continue
    return False
