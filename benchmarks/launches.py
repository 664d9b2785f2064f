"""Launches of spectral norm on a GPU, and a whole step's operators, counted on the meta device."""

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from engine.configuration import Config
from engine.models.spectral import spectral_weights
from engine.planning.counters import ChannelsLastConvolutions
from engine.planning.meta_step import MetaStep

# What one call of an operator of ours launches on a GPU; see the launchers in kernels/.
LAUNCHES = {
    "sswgan::power_iteration_": 4,
    "sswgan::spectral_normalize": 2,
    "sswgan::spectral_normalize_dw": 2,
    "sswgan::spectral_normalize_all": 2,
    "sswgan::spectral_normalize_all_dw": 2,
}

# Operators that only describe memory anew, or allocate it.
_WITHOUT_LAUNCH = {
    *("_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like"),
    *("empty_strided", "expand", "flatten", "new_empty", "permute", "reshape", "select", "slice"),
    *("split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view"),
}


class LaunchCounter(TorchDispatchMode):
    """Counts launches: each of PyTorch's operators that computes is one at least, ours `LAUNCHES`.

    Raises KeyError for an operator of ours that is not in the table.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count, then run."""
        self.calls[func._schema.name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def launches(self) -> int:
        """So far."""
        found = 0
        for name, count in self.calls.items():
            if name.startswith("aten::"):
                found += count * (name.removeprefix("aten::") not in _WITHOUT_LAUNCH)
            elif name in LAUNCHES:
                found += count * LAUNCHES[name]
            else:
                raise KeyError(f"{__file__}: LAUNCHES does not say what {name} launches")
        return found

    @property
    def operators(self) -> int:
        """Calls that launch something, each counted once, whatever it launches."""
        launching = [name for name in self.calls if name.split("::")[1] not in _WITHOUT_LAUNCH]
        return sum(self.calls[name] for name in launching)


def count_step_operators(config: Config, stage_number: int) -> int:
    """Operators that launch something in an iteration of one micro-batch per update.

    What a GPU runs, DeepSpeed and the optimizers left out.
    """
    with kernels.meta_as("cuda"):
        step = MetaStep(config, stage_number)
        with ChannelsLastConvolutions(), LaunchCounter() as counter:
            for _ in range(config.stages[stage_number].training.discriminator_steps):
                step.d_step()
            step.g_step()
    return counter.operators


class SpectralLaunches(NamedTuple):
    """Launches of one network's spectral norm, all weights together."""

    iteration: int  # one power iteration, which also gives the singular values
    forward: int  # Ŵ of every weight
    backward: int  # dW of every weight


def count_spectral_launches(network: nn.Module, implementation: str) -> SpectralLaunches:
    """Of a network on the meta device, in bf16. `implementation`: the operators' "triton", ..."""
    layers = spectral_weights(network)
    weights = [layer.weight for layer in layers]
    lists = weights, [layer.u for layer in layers], [layer.v for layer in layers]
    dtypes, folds = [torch.bfloat16 for _ in layers], [layer.fold for layer in layers]
    with LaunchCounter() as iteration:
        kernels.power_iteration_(*lists, impl=implementation)
    with LaunchCounter() as forward:
        normalized = kernels.spectral_normalize_all(*lists, dtypes, folds, impl=implementation)
    upstream = [torch.empty_like(weight) for weight in normalized]
    with LaunchCounter() as backward:
        torch.autograd.grad(normalized, weights, upstream)
    return SpectralLaunches(iteration.launches, forward.launches, backward.launches)
