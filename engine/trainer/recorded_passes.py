"""A network's passes without gradients as CUDA graphs: recorded once, replayed from then on."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from engine.models.spectral import divided_one_by_one

_NUM_WARM_UPS = 2  # Triton compiles, cuDNN chooses, the allocator grows


def record_passes(network: nn.Module) -> None:
    """From now on, replay passes without gradients; every other one runs as it did."""
    network.forward = RecordedPasses(network)


def recorded_bytes(device: torch.device) -> int:
    """Bytes of a CUDA device that recordings hold and no tensor does.

    A pass's activations are freed when it has been recorded, into memory that is the recording's
    alone: to `torch.cuda.memory_allocated` they are gone, and to everybody else as well.
    """
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()
        if segment["device"] == device.index and tuple(segment["segment_pool_id"]) != (0, 0)
    )


class RecordedPasses:
    """Takes the place of a network's `forward`.

    A recording is of one set of shapes, on CUDA, and reads weights and buffers where they lie. So a
    replay sees values that are written into them in place; where one has been replaced, the pass is
    recorded anew. A replay returns copies, which the next one leaves as they are.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network, self._forward = network, network.forward
        self._recordings: dict[Hashable, _Recording] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `forward`."""
        if torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        leaves, structure = tree_flatten((args, kwargs))
        key = (str(structure), *map(_kind, leaves))
        addresses = _addresses(self._network)
        recording = self._recordings.get(key)
        if recording is None or recording.addresses != addresses:

            def run(given: list[Any]) -> Any:
                again_args, again_kwargs = tree_unflatten(given, structure)
                return self._forward(*again_args, **again_kwargs)

            # Not beside the old one: each holds all the memory of its pass.
            recording = self._recordings.pop(key, None)
            del recording
            recording = self._recordings[key] = _Recording(run, leaves, addresses)
        return recording.replay(leaves)


class _Recording:
    """One CUDA graph and the memory that it reads from and writes to."""

    def __init__(
        self, run: Callable[[list[Any]], Any], leaves: list[Any], addresses: list[int]
    ) -> None:
        self.addresses = addresses
        self._inputs = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
        # Weights divided all at once take addresses from memory of the host, gone in a replay.
        with divided_one_by_one():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_NUM_WARM_UPS):
                    run(self._inputs)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            # Other threads, which decode videos, may allocate meanwhile.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._output = run(self._inputs)

    def replay(self, leaves: list[Any]) -> Any:
        for mine, given in zip(self._inputs, leaves, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(given)
        self._graph.replay()
        outputs, structure = tree_flatten(self._output)
        return tree_unflatten([output.clone() for output in outputs], structure)


def _kind(leaf: Any) -> Hashable:
    """The part of an argument that a recording depends on: a tensor's shape, or another's value."""
    return (tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


def _addresses(network: nn.Module) -> list[int]:
    return [tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers())]
