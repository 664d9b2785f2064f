"""The plain PyTorch build that the engine is measured against is of the same networks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_networks import clip_generator, discriminators, upsampling_generator
from torch import Tensor, nn

import kernels
from benchmarks.plain import PlainOperators
from benchmarks.setups import BUILDS
from benchmarks.trainers import make_engines, make_trainer, stage_builder, trainer_around
from benchmarks.whole_step import operators_of as operators_of_build
from engine.configuration import load_config
from engine.models import update_spectral_norm
from engine.models.operators import hand_operators, operators_of
from engine.models.spectral import SpectralWeight, spectral_weights
from engine.trainer.ranks import Ranks

LABELS = torch.tensor([1, 3])


def network(name: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A small network whose weights have singular values other than 1, and a pass of it."""
    random = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    z, low, video = draw(2, 16), draw(2, 2, 3, 8, 8), draw(2, 4, 3, 16, 16)
    torch.manual_seed(0)
    build: dict[str, Callable[..., nn.Module]] = {
        "clip": clip_generator, "upsampling": upsampling_generator, "D": discriminators
    }  # fmt: skip
    made = build[name](num_classes=5)
    with torch.no_grad():
        for weight in spectral_weights(made):
            weight.weight.mul_(draw(1).exp())  # still orthogonal: any u that is an image of W stays
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter.normal_(generator=random)
    update_spectral_norm(made, num_iterations=2)
    inputs: dict[str, tuple[Any, ...]] = {
        "clip": (z, LABELS, 3),
        "upsampling": (z, LABELS, low),
        "D": (video, LABELS, low, torch.tensor([[0, 2], [1, 3]])),
    }
    if name == "D":
        return made, lambda: made(*inputs[name]).all
    return made, lambda: made(*inputs[name])


def outcome(made: nn.Module, run: Callable[[], Tensor]) -> list[Tensor]:
    """Of one pass: its result, and the gradient of every parameter for the same upstream."""
    y = run()
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    return [y.detach(), *torch.autograd.grad(y, list(made.parameters()), dy)]


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("name", ["clip", "upsampling", "D"])
def test_plain_networks_are_the_same_networks(name: str, channels_last: bool) -> None:
    made, run = network(name)
    expected = outcome(made, run)
    with PlainOperators(channels_last=channels_last).handed_to(made):
        got = outcome(made, run)
    # Some 30 layers of sums of up to 600 terms, each off by √600 roundings of fp32.
    rounding = 600**0.5 * torch.finfo(torch.float32).eps
    # A bias in front of a norm has a gradient of zero: a sum of others that cancel.
    cancelled = rounding * max(gradient.norm().item() for gradient in expected[1:])
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= 30 * rounding * b.norm() + cancelled


def test_handed_to_one_network_and_within_the_context_only() -> None:
    (made, _), (other, _) = network("D"), network("D")
    plain = PlainOperators(channels_last=True)
    with plain.handed_to(made):
        assert operators_of(made) is plain
        assert operators_of(other) is kernels
    assert operators_of(made) is kernels


@pytest.mark.parametrize("name", ["clip", "upsampling", "D"])
def test_nothing_but_the_handed_operators_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both compute the same, so that only their absence tells which of them ran."""
    made, run = network(name)
    functions = [n for n in vars(PlainOperators) if n in kernels.__all__]
    assert len(functions) > 10
    for function in functions:
        monkeypatch.delattr(kernels, function)
    with pytest.raises(AttributeError):
        run()
    with PlainOperators(channels_last=True).handed_to(made):
        outcome(made, run)


def test_a_missing_operator_is_told() -> None:
    made, run = network("clip")
    hand_operators(made, object())
    with pytest.raises(AttributeError, match="no attribute 'spectral_normalize'"):
        run()


def test_time_is_pooled_too_where_asked() -> None:
    x, operators = torch.randn(1, 4, 2, 4, 4), PlainOperators(channels_last=False)
    expected = x.view(1, 2, 2, 2, 2, 2, 2, 2).mean((2, 5, 7))  # [B, T, 2, C, H, 2, W, 2]
    torch.testing.assert_close(operators.average_pool(x, (2, 2, 2)), expected)


def test_every_training_pass_iterates_and_no_other() -> None:
    """Against the largest singular value by LAPACK, of a matrix that is not orthogonal."""
    torch.manual_seed(0)
    weight = SpectralWeight(12, 3, 3, 8)
    nn.init.normal_(weight.weight)
    nn.init.normal_(weight.u)
    with PlainOperators(channels_last=True).handed_to(weight):
        weight.requires_grad_(False)
        u = weight.u.clone()
        weight()
        assert torch.equal(weight.u, u)
        weight.requires_grad_(True)
        for _ in range(300):
            normalized = weight()
    # (s₂/s₁)²⁰⁰ is what is left of the start after 300 steps; s₂/s₁ is 0.93 here.
    largest = torch.linalg.svdvals(weight.weight.flatten(1))[0]
    torch.testing.assert_close(normalized, weight.weight / largest, rtol=1e-5, atol=1e-7)


def test_plain_adam_takes_the_step_that_deepspeed_takes(tiny: Any, ranks: Ranks) -> None:
    """Both on the engine's operators, from the same weights, on the same random numbers."""
    config = load_config(tiny.config_file, ["training.zero_stage=0"])
    theirs = make_trainer(config, 1, ranks)
    builder = stage_builder(config, 1, ranks)
    engines = make_engines(builder, plain=True)
    for engine, other in zip(engines, (theirs.g_engine, theirs.d_engine), strict=True):
        engine.module.load_state_dict(other.module.state_dict())
    torch.manual_seed(4)  # the clips
    plain = trainer_around(builder, *engines)
    theirs._reals = plain._reals
    before = [weights_of(engine.module) for engine in engines]
    expected, got = theirs.train_step(), plain.train_step()
    assert got == pytest.approx(expected, rel=1e-5)
    others = theirs.g_engine.module, theirs.d_engine.module
    for start, engine, other in zip(before, engines, others, strict=True):
        a, b = weights_of(engine.module), weights_of(other)
        # Where a gradient is rounding alone Adam moves by the learning rate in any direction, as
        # biases in front of a norm do, and a few of the weights.
        assert (a - b).norm() <= 1e-3 * (b - start).norm()
        assert (b - start).norm() > 0


def test_frozen_stages_are_plain_too(tiny: Any, ranks: Ranks) -> None:
    """Ours have their weights folded once; a plain build's windows are the same up to rounding."""
    config = load_config(tiny.config_file)
    windows = []
    for name in ("ours", "fp32"):
        torch.manual_seed(5)
        operators = operators_of_build(BUILDS[name])
        previous = stage_builder(config, 2, ranks, operators).previous
        assert previous is not None
        random = torch.Generator().manual_seed(6)
        zs = [torch.randn(4, config.stages[1].generator.latent_size, generator=random)]
        labels = torch.tensor([0, 1, 0, 1])
        windows.append(previous.cascade.sample_window(2, zs, labels, random))
    assert windows[0].std() > 0.01
    torch.testing.assert_close(windows[1], windows[0], rtol=1e-4, atol=1e-5)


def weights_of(network: nn.Module) -> Tensor:
    """Copies of all that are not biases, in a row."""
    return torch.cat([p.detach().flatten() for p in network.parameters() if p.ndim > 1])


@pytest.mark.slow
def test_compiled_in_one_graph() -> None:
    """A graph that breaks would leave the network eager, and the comparison a pretence."""
    made, run = network("upsampling")
    with PlainOperators(channels_last=True).handed_to(made):
        expected = run()
        made.compile(fullgraph=True, backend="eager")
        torch.testing.assert_close(run(), expected)
