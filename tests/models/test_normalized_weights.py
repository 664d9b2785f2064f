"""All weights of a network prepared at once: the same function, and nothing stale."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from small_networks import clip_generator, discriminators, results, run, upsampling_generator
from torch import Tensor, nn

import kernels
from engine.models.activation_checkpointing import set_checkpointing
from engine.models.discriminators import ResidualTower
from engine.models.generator import GeneratorTrunk
from engine.models.layers import Convolution, Embedding
from engine.models.norms import FrameNorm, Modulation
from engine.models.prepared import PreparedLayer, layers_of
from engine.models.spectral import (
    SpectralWeight,
    divided_one_by_one,
    normalized_weights,
    settle_weights,
    spectral_weights,
    update_spectral_norm,
)
from kernels.convolution.folding import fold

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "clip, GRU": partial(clip_generator, num_classes=5),
    "upsampling, conv": partial(upsampling_generator, num_classes=5),
    "D": partial(discriminators, num_classes=5),
}


@pytest.fixture
def singles(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Weights that were divided one by one."""
    divided: list[Tensor] = []

    def normalize(weight: Tensor, *arguments: Any, **options: Any) -> Tensor:
        divided.append(weight)
        return one_by_one(weight, *arguments, **options)

    one_by_one = kernels.spectral_normalize
    monkeypatch.setattr(kernels, "spectral_normalize", normalize)
    return divided


def build(name: str) -> nn.Module:
    """Off the orthogonal start, so that no σ is 1."""
    torch.manual_seed(0)
    network = NETWORKS[name]()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    update_spectral_norm(network, num_iterations=3)
    return network


def nothing_prepared(network: nn.Module) -> bool:
    return all(layer.prepared is None for layer in layers_of(network, PreparedLayer))


def distance(found: list[Tensor], truth: list[Tensor]) -> float:
    """Relative, in the l2 norm over all the elements of all the tensors."""
    off = sum((a.double() - b).square().sum().item() for a, b in zip(found, truth, strict=True))
    return float((off / sum(b.square().sum().item() for b in truth)) ** 0.5)


def in_fp64(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A copy that computes in fp64 throughout, what it turns into fp32 included."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    network = copy.deepcopy(network).double()
    for module in network.modules():
        if isinstance(module, GeneratorTrunk | ResidualTower):
            module.compute_dtype = torch.float64
    return network


@pytest.mark.parametrize("name", NETWORKS)
def test_in_a_list_as_one_by_one(name: str, singles: list[Tensor]) -> None:
    """In fp64 up to 1e-12; in fp32 at most twice as far from that and a rounding; all of them."""
    network = build(name)
    found: dict[str, list[Tensor]] = {}
    for form, context in (("singles", divided_one_by_one()), ("lists", nullcontext())):
        singles.clear()
        with context, pytest.MonkeyPatch.context() as patch:
            found[form] = results(network)
            found[f"{form}, fp64"] = results(in_fp64(network, patch))
        assert (len(singles) == 0) == (form == "lists")
        assert nothing_prepared(network)
    truth = found["singles, fp64"]
    assert distance(found["lists, fp64"], truth) <= 1e-12
    eps = torch.finfo(torch.float32).eps
    assert distance(found["lists"], truth) <= 2 * distance(found["singles"], truth) + eps


@pytest.mark.parametrize("name", ["clip, GRU", "upsampling, conv"])
def test_recomputing_sees_the_same_tensors(name: str, singles: list[Tensor]) -> None:
    """Bit for bit, also in a second backward pass through the same graph."""
    network = build(name)
    assert isinstance(network, GeneratorTrunk)
    plain = results(network)
    set_checkpointing(network, "blocks")
    y = run(network)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    prepared: list[Tensor] = []
    layers = [*spectral_weights(network), *layers_of(network, Modulation)]
    for layer in layers:
        layer.register_forward_hook(lambda *arguments: prepared.append(arguments[2]))
    leaves = list(network.parameters())
    for _ in range(2):
        got = torch.autograd.grad(y, leaves, upstream, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip((y, *got), plain, strict=True))
        assert nothing_prepared(network)
    assert len({id(tensor) for tensor in prepared}) <= len(layers)
    assert len(prepared) > len(layers)
    assert singles == []


@pytest.mark.parametrize("name", NETWORKS)
def test_two_passes_before_their_backward_passes(name: str) -> None:
    """D on real and D on fake videos; and a pass without gradients in between."""
    network = build(name)
    apart = [results(network, seed)[1:] for seed in (1, 2)]
    ys = [run(network, 1)]
    with torch.no_grad():
        assert not run(network, 3).requires_grad
    ys.append(run(network, 2))
    upstream = torch.randn(ys[0].shape, generator=torch.Generator().manual_seed(2))
    together = torch.autograd.grad(ys, list(network.parameters()), [upstream] * 2)
    for got, one, other in zip(together, *apart, strict=True):
        # A sum of the two, in the order that autograd takes.
        torch.testing.assert_close(got, one + other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_changed_weight_is_seen_by_the_next_pass(name: str) -> None:
    """Through `.data`, as DeepSpeed writes it, which leaves no trace."""
    network = build(name)
    before = run(network)
    for layer in spectral_weights(network):
        layer.weight.data.add_(torch.randn_like(layer.weight), alpha=0.1)
    after = run(network)
    assert not torch.allclose(after, before)
    assert torch.equal(after, run(copy.deepcopy(network)))


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_stale_after_an_exception(name: str) -> None:
    network = build(name)
    expected = results(network)
    last = spectral_weights(network)[-1]

    def fail(*arguments: object) -> None:
        raise RuntimeError("in the middle")

    hook = last.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        run(network)
    hook.remove()
    assert nothing_prepared(network)
    assert all(torch.equal(a, b) for a, b in zip(results(network), expected, strict=True))


def test_entered_again_and_within_itself() -> None:
    """What was there before comes back, step by step."""
    network = build("clip, GRU")
    first, second = (normalized_weights(network, torch.float32) for _ in range(2))
    layer = spectral_weights(network)[0]
    with first:
        outer = layer.prepared
        with second, first:
            assert layer.prepared is outer
        assert layer.prepared is outer
        with pytest.raises(RuntimeError, match="within"), second:
            raise RuntimeError("within")
        assert layer.prepared is outer
    assert nothing_prepared(network)


def test_other_networks_are_left_alone() -> None:
    """A cascade runs the frozen stages before its own, within or beside its pass."""
    inner, outer = build("clip, GRU"), build("upsampling, conv")
    with normalized_weights(outer, torch.float32):
        held = [layer.prepared for layer in spectral_weights(outer)]
        assert nothing_prepared(inner)
        with torch.no_grad(), normalized_weights(inner, torch.float32):
            run(inner)
        assert nothing_prepared(inner)
        now = [layer.prepared for layer in spectral_weights(outer)]
        assert all(a is b for a, b in zip(now, held, strict=True))


def test_partitioned_weights_are_divided_where_they_are_whole(monkeypatch: Any) -> None:
    """ZeRO-3: one of them empty, or marked by DeepSpeed although it is gathered now."""
    network = build("clip, GRU")
    weight = spectral_weights(network)[3].weight
    whole = weight.data
    weight.data = torch.empty(0)
    with normalized_weights(network, torch.float32):
        assert nothing_prepared(network)
    weight.data = whole
    with normalized_weights(network, torch.float32):
        assert not nothing_prepared(network)
    monkeypatch.setattr(weight, "ds_status", "AVAILABLE", raising=False)
    with normalized_weights(network, torch.float32):
        assert nothing_prepared(network)


def test_for_references_nothing_is_prepared_unless_asked_for() -> None:
    """They are of weights into which nothing is folded."""
    network = build("D")
    with kernels.use("reference"):
        settle_weights(network, torch.float32)
        with normalized_weights(network, torch.float32):
            assert nothing_prepared(network)
    for implementation in ("reference", "pytorch"):
        with normalized_weights(network, torch.float32, implementation=implementation):
            assert not nothing_prepared(network)
    with pytest.raises(kernels.ImplementationError, match="no implementation 'cuda'"):
        normalized_weights(network, torch.float32, implementation="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["clip, GRU", "upsampling, conv"])
def test_settled_weights_are_divided_once(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers bit for bit, and the weights themselves are gone."""
    network = build(name)
    assert isinstance(network, GeneratorTrunk)
    network.compute_dtype = dtype
    expected = run(network)
    settle_weights(network, dtype)
    for divides in ("spectral_normalize", "spectral_normalize_all"):
        monkeypatch.setattr(kernels, divides, None)
    assert torch.equal(run(network), expected)
    with torch.no_grad():
        assert torch.equal(run(network), expected)
    settle_weights(network, dtype)
    assert torch.equal(run(copy.deepcopy(network)), expected)
    prepared = [layer.prepared for layer in spectral_weights(network)]
    assert all(kernel is not None and not kernel.requires_grad for kernel in prepared)
    assert not any(key.endswith(".weight") for key in network.state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        network.load_state_dict(build(name).state_dict())


def test_on_the_meta_device_they_are_prepared_in_their_dtypes() -> None:
    """As on a GPU: what costs are counted from."""
    with torch.device("meta"):
        network = upsampling_generator(num_classes=5, compute_dtype=torch.bfloat16)
    with normalized_weights(network, torch.bfloat16):
        prepared = {name: m.prepared for name, m in network.named_modules() if hasattr(m, "u")}
    kept = {name for name, tensor in prepared.items() if tensor.dtype == torch.float32}
    owners = (FrameNorm, Embedding)
    parts = [(name, m) for name, m in network.named_modules() if isinstance(m, owners)]
    expected = {
        f"{name}.{n}" for name, m in parts for n, part in m.named_modules() if hasattr(part, "u")
    }
    assert kept == expected
    assert {tensor.dtype for tensor in prepared.values()} == {torch.float32, torch.bfloat16}
    assert nothing_prepared(network)
    with divided_one_by_one(), normalized_weights(network, torch.bfloat16):
        assert nothing_prepared(network)
    with normalized_weights(network, torch.bfloat16):
        assert not nothing_prepared(network)


def test_what_a_layer_gets() -> None:
    """The prepared tensor in the dtype it was made for, else one of its own; a kernel with a fold
    only where none is asked for by dtype."""
    torch.manual_seed(0)
    folded, plain = Convolution(4, 5, resample="up"), Convolution(4, 5)
    network = nn.ModuleList([folded, plain, SpectralWeight(3, 4, kept_dtype=True)])
    whole = [layer().detach() for layer in spectral_weights(network)]
    with normalized_weights(network, torch.float16):
        kernel, how = folded.operands(torch.float16)[0]
        assert how == "upsampling"
        assert torch.equal(kernel, fold(whole[0], "upsampling").half())
        assert torch.equal(folded.normalized(torch.float16), whole[0].half())
        assert plain.operands(torch.float16)[0] is plain.normalized.prepared
        assert torch.equal(plain.normalized(), whole[1])
        assert network[2]() is network[2].prepared
    assert torch.equal(folded.operands(torch.float16)[0], whole[0])
    assert nothing_prepared(network)
