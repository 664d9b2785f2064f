"""Which operators a network's layers run: those of `kernels`, or others that it is handed.

Layers call `self.operators.conv2d(...)` and the like. A network that is handed an object with
functions of the same names and arguments runs on these, as the plain PyTorch build does that the
engine is measured against (benchmarks/plain.py).
"""

from typing import Any

from torch import nn

import kernels
from engine.models.prepared import layers_of


class OperatorLayer(nn.Module):
    """A layer that computes with operators."""

    operators: Any = kernels
    """Where it finds them by their names; see `hand_operators`."""


def hand_operators(network: nn.Module, operators: Any) -> None:
    """From now on every layer of the network runs these operators; `kernels` are the usual ones.

    A network with other operators runs them one by one: nothing is prepared for all its layers at
    once, and it makes whole clips where single frames would do. Settled weights stay as they are,
    in a form that only `kernels` read: hand the operators over before.
    """
    for layer in layers_of(network, OperatorLayer):
        layer.operators = operators


def operators_of(network: nn.Module) -> Any:
    """The operators that the network's layers run."""
    return layers_of(network, OperatorLayer)[0].operators
