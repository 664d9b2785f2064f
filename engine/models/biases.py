"""Layers with a bias. A network rounds all its biases at once to the dtype that it computes in."""

import torch
from torch import Tensor, nn

from engine.models.prepared import PreparedLayer, layers_of


class BiasedLayer(PreparedLayer):
    """A layer with a bias, zero at first, of which a pass may have prepared the rounded one."""

    bias: nn.Parameter | None

    def __init__(self, num_biases: int, *, kept_dtype: bool = False) -> None:
        super().__init__()
        self.num_biases, self._kept_dtype = num_biases, kept_dtype
        self.bias = nn.Parameter(torch.zeros(num_biases)) if num_biases else None

    def rounds_to(self, dtype: torch.dtype) -> bool:
        """Whether there is a bias, and another one in a network that computes in `dtype`."""
        return self.bias is not None and not self._kept_dtype and self.bias.dtype != dtype

    def bias_in(self, dtype: torch.dtype | None) -> Tensor:
        """The bias in `dtype`. With None it is the prepared one, or else the bias as it is kept."""
        if self.prepared is not None and dtype in (None, self.prepared.dtype):
            return self.prepared
        assert self.bias is not None
        return self.bias.to(dtype or self.bias.dtype)


def rounded_biases(network: nn.Module, dtype: torch.dtype) -> dict[PreparedLayer, Tensor]:
    """By layer, the biases in the dtype that the network computes in. Biases that need no rounding
    are left out."""
    # Those of an odd size come last: the others' values are where wide loads find them.
    layers = sorted(
        (layer for layer in layers_of(network, BiasedLayer) if layer.rounds_to(dtype)),
        key=lambda layer: layer.num_biases % 64 != 0,
    )
    if not layers:
        return {}
    together = torch.cat([layer.bias for layer in layers if layer.bias is not None]).to(dtype)
    return dict(zip(layers, together.split([layer.num_biases for layer in layers]), strict=True))
