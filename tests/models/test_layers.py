"""Spectral norm and initialisation, of single layers and of whole networks."""

import pytest
import torch
from small_networks import clip_generator, discriminators, upsampling_generator
from torch import Tensor, nn

from engine.models.discriminators import Discriminators
from engine.models.generator import ClipGenerator, GeneratorTrunk
from engine.models.layers import ConvGRU, Embedding, Linear
from engine.models.spectral import (
    SpectralWeight,
    divided_one_by_one,
    spectral_weights,
    update_spectral_norm,
)


@pytest.fixture(params=["clip, GRU", "clip, conv", "upsampling, conv", "upsampling, GRU", "D"])
def network(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    kind, _, temporal = request.param.partition(", ")
    if kind == "D":
        return discriminators(num_classes=5)
    make = clip_generator if kind == "clip" else upsampling_generator
    return make(num_classes=5, temporal="conv_gru" if temporal == "GRU" else "separable_conv")


def test_every_parameter_is_a_normalised_weight_or_a_zero_bias(network: nn.Module) -> None:
    weights = {id(layer.weight) for layer in spectral_weights(network)}
    others = {n: p for n, p in network.named_parameters() if id(p) not in weights}
    assert len(weights) > 20
    assert all(name.endswith(".bias") and not p.any() for name, p in others.items())


def test_every_weight_is_orthogonal_with_its_singular_vectors_known(network: nn.Module) -> None:
    for layer in spectral_weights(network):
        matrix = layer.weight.detach().flatten(1)
        small = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
        torch.testing.assert_close(small, torch.eye(len(small)), rtol=0, atol=2e-5)
        torch.testing.assert_close(layer.u @ matrix @ layer.v, torch.tensor(1.0))


def test_update_brings_every_sigma_to_the_largest_singular_value(network: nn.Module) -> None:
    with torch.no_grad():
        for layer in spectral_weights(network):
            layer.weight.normal_()
    update_spectral_norm(network, num_iterations=400)
    for layer in spectral_weights(network):
        top = torch.linalg.matrix_norm(layer().detach().flatten(1), ord=2)
        torch.testing.assert_close(top, torch.tensor(1.0), rtol=1e-3, atol=0)


def test_vectors_are_state_and_forward_leaves_them_alone() -> None:
    generator = clip_generator(num_classes=None)
    state = generator.state_dict()
    before = {k: v.clone() for k, v in state.items() if k.endswith((".u", ".v"))}
    assert len(before) == 2 * len(spectral_weights(generator))
    generator(torch.randn(2, 16), None, 3).sum().backward()
    assert all(torch.equal(state[k], v) for k, v in before.items())
    with torch.no_grad():
        for layer in spectral_weights(generator):
            layer.weight.normal_()
    update_spectral_norm(generator)
    assert not any(torch.equal(generator.state_dict()[k], v) for k, v in before.items())


def test_weights_are_read_only_inside_their_own_forward(network: nn.Module) -> None:
    """What partitioned weights (ZeRO-3) need: outside its module's forward a weight is empty."""
    with divided_one_by_one():  # all at once they are folded before they are divided
        expected = _run(network)
    for layer in spectral_weights(network):
        whole = layer.weight.data

        def gather(layer: SpectralWeight, _: object, whole: Tensor = whole) -> None:
            layer.weight.data = whole

        def release(layer: SpectralWeight, _: object, __: object) -> None:
            layer.weight.data = torch.empty(0)

        layer.register_forward_pre_hook(gather)
        layer.register_forward_hook(release)
        layer.weight.data = torch.empty(0)
    assert torch.equal(_run(network), expected)


def _run(network: nn.Module) -> Tensor:
    inputs = torch.Generator().manual_seed(1)
    labels, low = torch.tensor([1, 3]), torch.randn(2, 2, 3, 8, 8, generator=inputs)
    if isinstance(network, Discriminators):
        video = torch.randn(2, 4, 3, 16, 16, generator=inputs)
        scores: Tensor = network(video, labels, low, torch.tensor([[0, 2], [1, 3]])).all
        return scores
    assert isinstance(network, GeneratorTrunk)
    z = torch.randn(2, 16, generator=inputs)
    clip = isinstance(network, ClipGenerator)
    video = network(z, labels, 4) if clip else network(z, labels, low)
    return video


def test_meta_device_builds_and_initialises_later() -> None:
    with torch.device("meta"):
        generator = clip_generator(num_classes=5)
    assert all(p.is_meta for p in generator.parameters())
    generator.to_empty(device="cpu")
    for layer in spectral_weights(generator):
        layer.reset_parameters()
        gram = layer.weight.detach().flatten(1)
        assert torch.isclose(torch.linalg.matrix_norm(gram, ord=2), torch.tensor(1.0), atol=1e-5)


def test_linear_and_embedding_use_the_normalised_weight() -> None:
    torch.manual_seed(0)
    linear, embedding = Linear(3, 4), Embedding(5, 3)
    with torch.no_grad():
        linear.normalized.weight.mul_(7)
        linear.bias.copy_(torch.arange(4.0))  # type: ignore[union-attr]
        embedding.normalized.weight.mul_(7)
    x = torch.randn(2, 3)
    expected = x @ (linear.normalized.weight / 7).T + torch.arange(4.0)
    torch.testing.assert_close(linear(x), expected)
    rows = (embedding.normalized.weight / 7)[[4, 0]]
    torch.testing.assert_close(embedding(torch.tensor([4, 0])), rows)
    assert linear(x.bfloat16()).dtype == torch.bfloat16


def test_conv_gru_gates_are_in_their_places() -> None:
    """u near 1 keeps h at 0; u near 0 copies the candidate."""
    torch.manual_seed(0)
    gru = ConvGRU(4)
    x = torch.randn(1, 3, 4, 2, 2)
    with torch.no_grad():
        update, reset = gru.update.bias_in(None), gru.reset.bias_in(None)
        update.fill_(50)
        assert gru(x).abs().max() < 1e-6
        update.fill_(-50)
        reset.fill_(-50)  # and with r near 0 the candidate forgets h
        alone = torch.cat([gru(x[:, t : t + 1]) for t in range(3)], dim=1)
        torch.testing.assert_close(gru(x), alone)
        assert gru(x).max() > 0.1
