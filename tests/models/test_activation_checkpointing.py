"""What a network keeps for its backward pass changes nothing else, bit for bit."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, get_args

import pytest
import torch
from small_networks import clip_generator, discriminators, upsampling_generator
from torch import Tensor, nn

from engine.configuration import Training, load_config
from engine.models import update_spectral_norm
from engine.models.activation_checkpointing import Block, Checkpointing, set_checkpointing
from engine.models.construction import (
    build_discriminators,
    build_generator,
    build_joint_generator,
)
from engine.models.discriminators import Discriminators
from engine.models.norms import frame_norms
from engine.models.spectral import divided_one_by_one, spectral_weights
from engine.models.upsampler import UpsamplingGenerator

MODES: tuple[Checkpointing, ...] = get_args(Checkpointing)
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "clip, GRU": clip_generator,
    "upsampling, conv": upsampling_generator,
    "upsampling, GRU": partial(upsampling_generator, temporal="conv_gru"),
    "D": discriminators,
}


@pytest.fixture(params=["one by one", "in lists"])
def _weights(request: pytest.FixtureRequest) -> Iterator[None]:
    """How a pass divides its weights: each where it is used, as under ZeRO-3, or all at once."""
    with divided_one_by_one() if request.param == "one by one" else nullcontext():
        yield


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Off the orthogonal start, so that no σ is 1."""
    torch.manual_seed(0)
    network = NETWORKS[name](num_classes=5, compute_dtype=dtype)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    update_spectral_norm(network, num_iterations=3)
    return network


def inputs_of(network: nn.Module) -> tuple[list[Tensor], list[Any]]:
    """What has a gradient, and all arguments."""
    random = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).requires_grad_()

    labels, z, low = torch.tensor([1, 3]), randn(2, 16), randn(2, 2, 3, 8, 8)
    if isinstance(network, Discriminators):
        video = randn(2, 4, 3, 16, 16)
        return [video, low], [video, labels, low, torch.tensor([[0, 2], [1, 3]])]
    if isinstance(network, UpsamplingGenerator):
        return [z, low], [z, labels, low]
    return [z], [z, labels, 4]


def output(network: nn.Module, arguments: list[Any]) -> Tensor:
    found = network(*arguments)
    y: Tensor = found.all if isinstance(network, Discriminators) else found
    return y


def results(network: nn.Module) -> list[Tensor]:
    """The output, and the gradients of inputs and parameters."""
    leaves, arguments = inputs_of(network)
    y = output(network, arguments)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    return [y.detach(), *torch.autograd.grad(y, [*leaves, *network.parameters()], upstream)]


@pytest.mark.usefixtures("_weights")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_modes_are_equal(name: str, dtype: torch.dtype) -> None:
    network = build(name, dtype)
    vectors = [layer.u.clone() for layer in spectral_weights(network)]
    found = []
    for mode in MODES:
        set_checkpointing(network, mode)
        found.append(results(network))
    first, *others = found
    assert all(grad.abs().max() > 0 for grad in first)
    for other in others:
        assert [torch.equal(a, b) for a, b in zip(first, other, strict=True)] == [True] * len(first)
    for layer, u in zip(spectral_weights(network), vectors, strict=True):
        assert layer.u.equal(u)


@pytest.mark.parametrize("name", NETWORKS)
def test_only_blocks_run_twice_and_draw_nothing(name: str) -> None:
    """Nothing random: checkpoints do not save the generator's state."""
    network = build(name)
    blocks = [module for module in network.modules() if isinstance(module, Block)]
    assert len(blocks) == 9  # three units of three; three towers of three
    calls: list[nn.Module] = []
    for block in blocks:
        block.register_forward_pre_hook(lambda block, _: calls.append(block))
    _, arguments = inputs_of(network)
    state = torch.get_rng_state()
    for mode in MODES:
        set_checkpointing(network, mode)
        with torch.no_grad():
            output(network, arguments)
        assert len(calls) == 9
        calls.clear()
        y = output(network, arguments)
        assert len(calls) == 9
        y.sum().backward()
        assert [calls.count(block) for block in blocks] == [2 if mode == "blocks" else 1] * 9
        calls.clear()
    assert torch.get_rng_state().equal(state)


def test_two_passes_before_one_backward_pass() -> None:
    """As when real and fake are judged apart; gradients then add up, in the same order."""
    network = build("D")
    _, arguments = inputs_of(network)
    grads = []
    for mode in MODES:
        set_checkpointing(network, mode)
        loss = (
            output(network, arguments).sum()
            - output(network, [-arguments[0], *arguments[1:]]).sum()
        )
        grads.append(torch.autograd.grad(loss, list(network.parameters())))
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


def test_the_configuration_chooses(tiny: Any) -> None:
    """Of a joint generator the stage that trains, whatever the earlier ones say."""
    assert Training.model_fields["checkpointing"].annotation == Checkpointing
    config = load_config(
        tiny.config_file,
        ["training.checkpointing=blocks", "stages.1.training.checkpointing=none"],
    )

    def modes(network: nn.Module) -> set[tuple[bool, bool]]:
        kept = {norm.keeps_result for norm in frame_norms(network).values()} or {False}
        again = {m.recomputed for m in network.modules() if isinstance(m, Block)}
        return {(k, a) for k in kept for a in again}

    blocks, none = {(False, True)}, {(True, False)}
    assert modes(build_generator(config, 1)) == none
    assert modes(build_generator(config, 2)) == blocks
    assert modes(build_joint_generator(config, 2)) == blocks
    assert modes(build_discriminators(config, 1)) == {(False, False)}
    assert modes(build_discriminators(config, 2)) == blocks
    assert modes(build_generator(tiny.config(), 2)) == {(False, False)}
