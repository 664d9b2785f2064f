"""Whole networks on the operators they run by default against the operators' references."""

from collections.abc import Callable

import pytest
import torch
from small_networks import clip_generator, discriminators, upsampling_generator
from torch import Tensor, nn

import kernels
from engine.models import spectral_weights, update_spectral_norm
from engine.models.discriminators import Discriminators
from engine.models.generator import ClipGenerator
from engine.models.upsampler import UpsamplingGenerator

NUM_CLASSES = 5
NETWORKS: dict[str, Callable[[torch.dtype], nn.Module]] = {
    "clip, GRU": lambda dtype: clip_generator(num_classes=NUM_CLASSES, compute_dtype=dtype),
    "clip, conv": lambda dtype: clip_generator(
        num_classes=NUM_CLASSES, temporal="separable_conv", compute_dtype=dtype
    ),
    "upsampling, conv": lambda dtype: upsampling_generator(
        num_classes=NUM_CLASSES, compute_dtype=dtype
    ),
    "upsampling, GRU": lambda dtype: upsampling_generator(
        num_classes=NUM_CLASSES, temporal="conv_gru", compute_dtype=dtype
    ),
    "D": lambda dtype: discriminators(num_classes=NUM_CLASSES, compute_dtype=dtype),
}


def build(name: str, dtype: torch.dtype) -> nn.Module:
    """The same weights in every dtype: off their orthogonal start, σ and every bias not trivial."""
    torch.manual_seed(0)
    network = NETWORKS[name](dtype)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    update_spectral_norm(network, num_iterations=3)
    return network.to(dtype)


def results(network: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The network's output, the gradients of its inputs and of every parameter, in fp64."""
    random = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype).requires_grad_()

    labels, z, low = torch.tensor([1, 3]), randn(2, 16), randn(2, 2, 3, 8, 8)
    inputs = {"z": z, "low": low}
    if isinstance(network, Discriminators):
        inputs = {"video": randn(2, 4, 3, 16, 16), "low": low}
        frames = torch.tensor([[0, 2], [1, 3]])
        y = network(inputs["video"], labels, low, frames).all
    elif isinstance(network, UpsamplingGenerator):
        y = network(z, labels, low)
    else:
        assert isinstance(network, ClipGenerator)
        inputs = {"z": z}
        y = network(z, labels, 4)
    upstream = torch.randn(y.shape, generator=random).to(y.dtype)
    named = inputs | dict(network.named_parameters())
    gradients = torch.autograd.grad(y, list(named.values()), upstream)
    found = {"y": y.detach(), **dict(zip(named, gradients, strict=True))}
    return {name: tensor.double() for name, tensor in found.items()}


def reference_results(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    with kernels.use("reference"):
        return results(build(name, dtype), dtype)


@pytest.fixture
def _all_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks turn z, the sum over space and their output into fp32, which would hide 1e-12."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.mark.usefixtures("_all_fp64")
@pytest.mark.parametrize("name", NETWORKS)
def test_fp64_output_and_every_gradient(name: str) -> None:
    expected = reference_results(name, torch.float64)
    got = results(build(name, torch.float64), torch.float64)
    largest = max(g.abs().max().item() for key, g in expected.items() if key != "y")
    num_checked = 0
    for key, value in expected.items():
        # The floor is for biases before a norm: their gradient is zero but for what cancels.
        floor = 0 if key == "y" else 1e3 * torch.finfo(torch.float64).eps * largest
        error, scale = (got[key] - value).abs().max().item(), value.abs().max().item()
        assert error <= 1e-12 * scale + floor, key
        num_checked += scale > floor
    assert num_checked > len(spectral_weights(build(name, torch.float64)))
    # Bit for bit they differ: else the default would be the reference.
    assert any(not torch.equal(got[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_fp32_is_as_close_to_the_truth_as_the_reference(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        truth = reference_results(name, torch.float64)
    plain = reference_results(name, torch.float32)
    got = results(build(name, torch.float32), torch.float32)

    def error(found: dict[str, Tensor], keys: list[str]) -> float:
        """Relative, in the l2 norm over all the elements of all the tensors."""
        off = sum((found[key] - truth[key]).square().sum().item() for key in keys)
        return float((off / sum(truth[key].square().sum().item() for key in keys)) ** 0.5)

    for keys in (["y"], [key for key in truth if key != "y"]):
        # Both round every operator's result; that leaves a factor, and one rounding as the floor.
        assert error(got, keys) <= 2 * error(plain, keys) + torch.finfo(torch.float32).eps
