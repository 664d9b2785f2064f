"""An exponential moving average of the generator's weights.

It is an option: the paper uses none.
"""

import torch
from torch import nn

import kernels
from engine.trainer.deepspeed_engines import gathered
from engine.trainer.host_copies import Copy, new_copy

_ITERATIONS = 10  # from the live weights' vectors, which are close


class WeightAverage:
    """w̄ ← decay·w̄ + (1 − decay)·w after each generator update; u and v are copied.

    Under ZeRO-3 the weights are gathered to be read: the average is whole on every rank.
    """

    def __init__(self, network: nn.Module, *, decay: float, zero_stage: int) -> None:
        self._decay = decay
        self._zero_stage = zero_stage
        with gathered(network, zero_stage=zero_stage):
            self._average = {n: v.detach().clone() for n, v in network.state_dict().items()}
            self._is_weight = {name for name, _ in network.named_parameters()}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Take in the current weights."""
        with gathered(network, zero_stage=self._zero_stage):
            for name, value in network.state_dict().items():
                if name in self._is_weight:
                    self._average[name].lerp_(value, 1 - self._decay)
                else:
                    self._average[name].copy_(value)

    def state_dict(self, copy: Copy = new_copy) -> dict[str, torch.Tensor]:
        """Copies of the averaged weights, on the CPU, under the network's own names."""
        return {name: copy(name, value) for name, value in self._average.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore the average."""
        for name, value in state.items():
            self._average[name].copy_(value)


def with_own_vectors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Averaged weights for inference, with singular vectors of their own.

    The live weights' u and v would give the average too small a σ, so too large weights.
    """
    layers = [name.removesuffix("u") for name in state if name.endswith(".u")]
    vectors = {n: state[n].clone() for layer in layers for n in (f"{layer}u", f"{layer}v")}
    kernels.power_iteration_(
        [state[f"{layer}weight"] for layer in layers],
        [vectors[f"{layer}u"] for layer in layers],
        [vectors[f"{layer}v"] for layer in layers],
        _ITERATIONS,
    )
    return state | vectors
