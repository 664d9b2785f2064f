"""Small operators that a pass runs once for all layers of a network, not once per layer.

A network has hundreds of layers with the same ones: weights to divide, biases to round, gains and
biases of norms to compute from the condition. A GPU's host pays for every call. Layers use what is
prepared inside a `with` block; outside it every layer computes its own.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TypeVar

from torch import Tensor, nn

_Layer = TypeVar("_Layer", bound=nn.Module)


class PreparedLayer(nn.Module):
    """A layer of which a pass may have prepared something."""

    prepared: Tensor | None
    """Of the pass at hand; None: the layer computes its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("prepared", None, persistent=False)

    def prepare(self, tensor: Tensor | None) -> None:
        """Set `prepared`."""
        # As `self.prepared = tensor`, past checks that take a CPU 10 µs, for every layer and pass.
        self._buffers["prepared"] = tensor


class Prepared(AbstractContextManager["Prepared"]):
    """What layers have prepared inside `with`.

    Can be entered any number of times, also within another of the same layers: leaving it, by an
    exception too, brings back what there was before.
    """

    def __init__(self, prepared: Mapping[PreparedLayer, Tensor | None]) -> None:
        self._prepared = prepared
        self._before: list[list[Tensor | None]] = []

    def __enter__(self) -> "Prepared":
        self._before.append([layer.prepared for layer in self._prepared])
        for layer, tensor in self._prepared.items():
            layer.prepare(tensor)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for layer, tensor in zip(self._prepared, self._before.pop(), strict=True):
            layer.prepare(tensor)


def prepared_now(module: nn.Module) -> Prepared:
    """What is prepared at this moment for the layers of a part of a network, to be used again."""
    return Prepared({layer: layer.prepared for layer in layers_of(module, PreparedLayer)})


def layers_of(module: nn.Module, kind: type[_Layer]) -> list[_Layer]:
    """Every layer of a kind in a network, in a fixed order.

    Looked for once: a network's layers are there when it is built.
    """
    key = f"_layers_of_{kind.__name__}"
    found: list[_Layer] | None = module.__dict__.get(key)
    if found is None:
        found = [child for child in module.modules() if isinstance(child, kind)]
        object.__setattr__(module, key, found)
    return found
