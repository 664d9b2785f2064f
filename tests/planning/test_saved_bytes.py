"""What a forward pass keeps, of hand-made cases, against what it comes to by hand."""

import pytest
import torch
from torch import Tensor

from engine.planning.forward_pass import saved_for_backward


def test_saved_bytes_by_hand() -> None:
    weight = torch.empty(10, requires_grad=True, device="meta")
    table = torch.empty(99, device="meta")

    def forward(batch: int) -> Tensor:
        x = torch.empty(batch, 10, device="meta")
        product = x * weight  # keeps x: 40 bytes
        result = product.exp()  # keeps its result: 40
        result = result.view(-1, 2, 5) * result.view(-1, 2, 5)  # the same storage, twice
        return result.sum() + (weight.sum() * table).sum()  # keeps nothing of the batch

    assert saved_for_backward(forward) == 80
    assert saved_for_backward(forward, batches=(3, 7)) == 80
    with pytest.raises(ValueError, match="not so many a sample"):
        saved_for_backward(lambda batch: forward(1 + batch // 2), batches=(1, 4))


def test_recomputed_units_keep_less() -> None:
    """A block that is checkpointed keeps its input only."""
    layers = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Tanh(), torch.nn.Linear(64, 4))
    layers.to("meta")

    def inputs(batch: int) -> Tensor:
        return torch.empty(batch, 4, device="meta", requires_grad=True)

    # x 16 bytes, tanh's result 256.
    assert saved_for_backward(lambda batch: layers(inputs(batch))) == 16 + 256
    again = torch.utils.checkpoint.checkpoint
    assert saved_for_backward(lambda b: again(layers, inputs(b), use_reentrant=False)) == 16
