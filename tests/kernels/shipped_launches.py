"""What the shipped configurations launch of Triton on a GPU, found without one: JSON on stdout.

A training step of every stage of configs/*.yaml, and what sampling adds to them, on the meta
device. Registered operators run themselves, not their fakes, up to the launch, which is noted and
not done. To be run in a process of its own: where kernels are interpreted, nothing is launched.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

import kernels
from engine.configuration import Config, load_config, variant_names, with_training
from engine.planning.forward_pass import frozen_stages
from engine.planning.meta_step import MetaStep
from kernels.spectral_norm import cuda as power_iteration_cuda

CONFIGS = Path(__file__).parents[2] / "configs"
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class RealOperators(TorchDispatchMode):
    """Ours compute, and so launch; a meta tensor would be given the fake."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace != "sswgan":
            return func(*args, **(kwargs or {}))
        return func._op_dk(DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))


def specialisation(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What Triton compiles a launch for, in the terms of `kernels.compiled.variant.Variant`.

    Of numbers that are 1 Triton makes constants, which no variant does: programs only shrink.
    """
    names = kernel.arg_names
    values = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
    constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            arguments[name] = TYPES[value.dtype]
        elif name in constants or value is None:
            arguments[name] = value
        else:
            arguments[name] = "fp32" if isinstance(value, float) else "i32"
    return {
        "kernel": f"{kernel.fn.__module__}.{kernel.fn.__name__}",
        "arguments": arguments,
        "divisible": [k for k, v in values.items() if arguments[k] == "i32" and v % 16 == 0],
        "options": {k: v for k, v in kwargs.items() if k not in names},
    }


def train_and_sample(config: Config) -> None:
    """A D update and a G update of every stage, and a video of all of them, statistics fixed."""
    for number, stage in config.stages.items():
        asked = stage.training.micro_batch
        for samples in (4, 32) if asked == "auto" else (asked,):
            step = MetaStep(with_training(config, number, micro_batch=samples), number)
            with RealOperators():
                step.d_step()
                step.g_step()
    beyond = len(config.stages) + 1
    with torch.device("meta"), torch.no_grad():
        cascade = frozen_stages(config, beyond)
        zs = [torch.empty(1, stage.generator.latent_size) for stage in config.stages.values()]
        labels = torch.empty(1, dtype=torch.long) if config.data.num_classes else None
        with RealOperators():
            cascade.sample_previous(beyond, zs, labels, torch.Generator())


def main() -> None:
    """Every specialisation once."""
    found: dict[str, Any] = {}

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch = specialisation(kernel, args, kwargs)
        found[json.dumps(launch, sort_keys=True)] = launch

    JITFunction.run = note
    # Triton's form runs where csrc/ is not built: it is to be found whether or not it is here.
    power_iteration_cuda.unavailable = lambda: "Triton's launches are noted"
    with kernels.meta_as("cuda"):
        for path in sorted(CONFIGS.glob("*.yaml")):
            for name in variant_names(path):
                train_and_sample(load_config(path, [f"variant={name}"] if name else []))
    print(json.dumps(list(found.values())))


if __name__ == "__main__":
    main()
