"""What a forward pass keeps for its backward pass, counted on the meta device or any other."""

from collections.abc import Callable

import torch
from torch import Tensor

from engine.configuration import Config
from engine.models import build_generator
from engine.planning.forward_flops import generator_inputs


def saved_for_backward(forward: Callable[[int], object], batches: tuple[int, int] = (1, 2)) -> int:
    """Bytes per sample that a forward pass keeps for its backward pass.

    `forward(batch)` runs it once with gradients, on the meta device or any other. Counted are the
    storages of all tensors that autograd saves, each once: the more of them for the larger batch.
    So parameters, buffers and whatever else does not depend on the batch cancel. What a function
    keeps as a plain attribute of its context is not seen. Raises ValueError where the difference
    is not a whole number of bytes per sample.
    """
    fewer, more = batches
    difference = _saved_bytes(forward, more) - _saved_bytes(forward, fewer)
    if fewer >= more or difference % (more - fewer):
        raise ValueError(f"{difference} bytes more for batches {batches} are not so many a sample")
    return difference // (more - fewer)


def _saved_bytes(forward: Callable[[int], object], batch: int) -> int:
    # Kept alive until all are counted: a freed storage's address is given out again.
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward(batch)
    total = sum(storage.nbytes() for storage in storages.values())
    del result  # not before: the graph holds what was saved
    return total


def generator_saved_for_backward(config: Config, stage_number: int) -> int:
    """Bytes per sample that a stage's generator keeps, in the configuration's precision."""
    with torch.device("meta"):
        generator = build_generator(config, stage_number)

        def forward(batch: int) -> Tensor:
            inputs = generator_inputs(config, stage_number, batch, generator.latent_size)
            result: Tensor = generator(*inputs)
            return result

        return saved_for_backward(forward)
