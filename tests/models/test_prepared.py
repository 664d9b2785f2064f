"""What a pass computes at once for all layers: rounded biases, gains and biases of norms."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from small_networks import clip_generator, discriminators, results, run, upsampling_generator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from engine.models.activation_checkpointing import set_checkpointing
from engine.models.biases import BiasedLayer, rounded_biases
from engine.models.layers import Linear
from engine.models.norms import FrameNorm, Modulation, _Products, modulated_norms
from engine.models.prepared import PreparedLayer, layers_of
from engine.models.spectral import divided_one_by_one, normalized_weights, settle_weights

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "clip": partial(clip_generator, num_classes=5),
    "upsampling": partial(upsampling_generator, num_classes=5),
    "D": partial(discriminators, num_classes=5),
}
BF16 = torch.bfloat16


def build(name: str, dtype: torch.dtype = BF16) -> nn.Module:
    """With biases that are not zero."""
    torch.manual_seed(0)
    network = NETWORKS[name](compute_dtype=dtype)
    with torch.no_grad():
        for layer in layers_of(network, BiasedLayer):
            if layer.bias is not None:
                layer.bias.normal_()
    return network


class Roundings(TorchDispatchMode):
    """How many tensors are cast, and how many values."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float32:
            self.sizes.append(result.numel())
        return result


@pytest.mark.parametrize("name", NETWORKS)
def test_biases_are_rounded_at_once(name: str) -> None:
    network = build(name)
    layers = [layer for layer in layers_of(network, BiasedLayer) if layer.rounds_to(BF16)]
    assert len(layers) > 5
    with Roundings() as roundings:
        rounded = rounded_biases(network, BF16)
    assert set(rounded) == set(layers)
    assert roundings.sizes == [sum(layer.num_biases for layer in layers)]
    with normalized_weights(network, BF16):
        for layer in layers:
            assert layer.bias is not None
            assert torch.equal(layer.bias_in(BF16), layer.bias.to(BF16))
            assert layer.bias_in(None) is layer.bias_in(BF16)
            # Another dtype than the pass's is rounded by itself.
            assert torch.equal(layer.bias_in(torch.float16), layer.bias.half())
    assert all(layer.prepared is None for layer in layers_of(network, PreparedLayer))
    assert rounded_biases(network, torch.float32) == {}


def test_biases_of_even_sizes_begin_where_wide_loads_do() -> None:
    """In one piece of memory; those of three channels come last."""
    layers: list[PreparedLayer] = [Linear(4, size) for size in (3, 64, 5, 128, 64)]
    rounded = rounded_biases(nn.ModuleList(layers), BF16)
    at = {layers.index(layer): bias.storage_offset() for layer, bias in rounded.items()}
    assert at == {1: 0, 3: 64, 4: 192, 0: 256, 2: 259}
    assert len({bias.untyped_storage().data_ptr() for bias in rounded.values()}) == 1


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_as_one_by_one(name: str) -> None:
    """In fp64 up to rounding: products of many norms at once sum in another order."""
    network = build(name, torch.float64).double()
    for layer in layers_of(network, PreparedLayer):
        assert layer.prepared is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        with divided_one_by_one():
            expected = results(network)
        found = results(network)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", ["clip", "upsampling"])
def test_a_pass_makes_few_products_for_its_norms(name: str) -> None:
    """One for all gains of as many channels, one for all biases."""
    network = build(name)
    norms = [m for m in network.modules() if isinstance(m, FrameNorm)]
    groups = {(norm.gain.channels, norm.gain.offset) for norm in norms}
    assert 2 * len(groups) < len(norms)
    products = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            if func is torch.ops.aten.bmm.default:
                products.append(len(args[0]))
            return func(*args, **(kwargs or {}))

    condition = torch.randn(2, norms[0].gain.normalized.weight.shape[1])
    with normalized_weights(network, BF16), Products():
        alone = [(norm.gain(condition), norm.bias(condition)) for norm in norms]
        assert products == []
        with modulated_norms(network, condition):
            assert len(products) == 2 * len(groups)
            assert sum(products) == 2 * len(norms)
            for norm, (gain, bias) in zip(norms, alone, strict=True):
                torch.testing.assert_close(norm.gain(condition), gain, rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(norm.bias(condition), bias, rtol=1e-5, atol=1e-6)
                assert norm.gain(condition).is_contiguous()
        assert all(layer.prepared is None for layer in layers_of(network, Modulation))
    with modulated_norms(network, condition):  # no weights are prepared: nothing is
        assert all(layer.prepared is None for layer in layers_of(network, Modulation))


def test_products_have_derivatives_of_order_two() -> None:
    torch.manual_seed(0)
    condition = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    expected = torch.einsum("bk,gck->gbc", condition, weights)
    torch.testing.assert_close(_Products.apply(condition, weights), expected)
    assert torch.autograd.gradcheck(_Products.apply, (condition, weights))
    assert torch.autograd.gradgradcheck(_Products.apply, (condition, weights))


@pytest.mark.parametrize("name", ["clip", "upsampling"])
def test_recomputed_blocks_see_what_was_prepared(name: str) -> None:
    network = build(name)
    plain = results(network)
    set_checkpointing(network, "blocks")
    again = results(network)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_settled_networks_round_their_biases_once() -> None:
    network = build("clip")
    with torch.no_grad():
        expected = run(network)
        settle_weights(network, BF16)
        with Roundings() as roundings:
            assert torch.equal(run(network), expected)
        assert torch.equal(run(copy.deepcopy(network)), expected)
    num_biases = {layer.num_biases for layer in layers_of(network, BiasedLayer)}
    assert not num_biases & set(roundings.sizes)


def test_references_prepare_nothing() -> None:
    network = build("upsampling", torch.float32)
    seen = []
    for layer in layers_of(network, Modulation):
        layer.register_forward_hook(lambda layer, *_: seen.append(layer.prepared))
    with kernels.use("reference"):
        run(network)
    assert len(seen) > 5
    assert all(prepared is None for prepared in seen)
