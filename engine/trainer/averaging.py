"""An exponential moving average of the generator's weights. An option: the paper uses none."""

import torch
from torch import nn

from engine.trainer.deepspeed_engines import gathered


class WeightAverage:
    """w̄ ← decay·w̄ + (1 − decay)·w after each generator update; buffers are copied.

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

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averaged weights, under the network's own names."""
        return {name: value.cpu() for name, value in self._average.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore the average."""
        for name, value in state.items():
            self._average[name].copy_(value)
