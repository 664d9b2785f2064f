"""`training.acceleration`: what is accelerated trains the same, and what is not says why."""

import itertools
import re
from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import Tiny, differences, logged
from test_step import make
from torch import Tensor, nn
from torch._dynamo.utils import counters

from engine.configuration import Config
from engine.models.activation_checkpointing import Block
from engine.models.construction import build_generator
from engine.trainer import recorded_passes
from engine.trainer.acceleration import accelerate
from engine.trainer.previous import PreviousStages, load_cascade
from engine.trainer.ranks import Ranks
from engine.trainer.recorded_passes import RecordedPasses, record_passes, recorded_bytes
from engine.trainer.step import Trainer

EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def _compiler() -> Iterator[None]:
    """A compiler that has seen nothing, and its settings as they were."""
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        torch.compiler.reset()
        counters.clear()
        yield
    torch.compiler.reset()


def trainer(
    ranks: Ranks, config: Config, number: int, world_size: int = 1
) -> tuple[Trainer, list[str]]:
    made = make(ranks, config, number)
    job = Ranks(rank=0, world_size=world_size, local_rank=0, device=ranks.device)
    return made, accelerate(config.stages[number], job, made, None)


def compiled(network: nn.Module) -> set[bool]:
    blocks = [module for module in network.modules() if isinstance(module, Block)]
    return {block._compiled_call_impl is not None for block in blocks}


def close(a: list[dict[str, float]], b: list[dict[str, float]]) -> bool:
    """Losses and gradients' norms through some 20 layers, each with a rounding or two."""
    names = ("loss_D", "loss_G", "grad_norm_D", "grad_norm_G")
    return all(
        one[name] == pytest.approx(other[name], rel=40 * EPS, abs=40 * EPS)
        for one, other in zip(a, b, strict=True)
        for name in names
    )


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("_compiler")
def test_compiled_blocks(tiny: Tiny, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and differentiated by the compiler, but not translated into C++, which takes long;
    and computed again in the backward pass."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    settings = ["training.checkpointing=blocks"]
    plain, _ = trainer(ranks, tiny.config(*settings), 1)
    expected = [plain.train_step() for _ in range(2)]
    assert counters["stats"]["unique_graphs"] == 0
    fast, notes = trainer(ranks, tiny.config(*settings, "training.acceleration=compile"), 1)
    assert notes == []
    assert compiled(fast.g_engine.module) == compiled(fast.d_engine.module) == {True}
    got = [fast.train_step()]
    # G's three blocks with gradients and without; D's four for a D and for a G update.
    assert counters["stats"]["unique_graphs"] == 2 * 3 + 2 * 4
    assert not counters["graph_break"]
    got.append(fast.train_step())
    assert counters["stats"]["unique_graphs"] == 14  # nothing is compiled again
    assert close(got, expected)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("_compiler")
def test_compiled_discriminators(tiny: Tiny, ranks: Ranks) -> None:
    """In C++, for a D update; without g++'s optimisation, which takes most of the time."""
    plain, _ = trainer(ranks, tiny.config(), 1)
    expected = [plain.d_step() for _ in range(2)]
    fast, _ = trainer(ranks, tiny.config("training.acceleration=compile"), 1, world_size=2)
    with torch._inductor.config.patch("aot_inductor.debug_compile", True):
        got = [fast.d_step() for _ in range(2)]
    assert counters["stats"]["unique_graphs"] == 4
    assert counters["inductor"]
    for one, other in zip(got, expected, strict=True):
        for name in ("loss_D", "grad_norm_D"):
            torch.testing.assert_close(one[name], other[name], rtol=40 * EPS, atol=40 * EPS)


def test_what_is_left_out_says_why(tiny: Tiny, ranks: Ranks) -> None:
    config = tiny.config("training.zero_stage=2", "training.acceleration=compile")
    made, notes = trainer(ranks, config, 1)
    why = "ZeRO-2 partitions its gradients or weights; use ZeRO 0 or 1"
    assert notes == [
        f"acceleration=compile leaves out the generator: {why}",
        f"acceleration=compile leaves out the discriminators: {why}",
    ]
    assert compiled(made.g_engine.module) == compiled(made.d_engine.module) == {False}

    # Frozen stages are not partitioned, and reduce over no ranks.
    states = {1: build_generator(config, 1).state_dict()}
    previous = PreviousStages(load_cascade(config, states, ranks.device), "")
    assert len(accelerate(config.stages[1], ranks, made, previous)) == 2
    assert compiled(previous.cascade) == {True}

    made, notes = trainer(ranks, tiny.config("training.acceleration=compile"), 1, world_size=2)
    assert notes == [
        "acceleration=compile leaves out the generator: its norms wait for all 2 ranks; "
        "use synchronized_norms=false"
    ]
    assert compiled(made.g_engine.module) == {False}
    assert compiled(made.d_engine.module) == {True}


def test_without_a_gpu_there_are_no_graphs(tiny: Tiny, tmp_path: Path) -> None:
    """It says so in one line, and trains on as it would without."""
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    runs = [tmp_path / "none", tmp_path / "cuda_graphs"]
    for out in runs:
        setting = f"training.acceleration={out.name}"
        finished = tiny.train(1, out, "--max-steps", "1", "--set", setting)
        assert finished.code == 0, finished.err
    note = "note: acceleration=cuda_graphs is not used: there is no CUDA device"
    assert re.findall("note: acceleration.*", finished.out) == [note]
    assert differences(*(logged(out / "stage1") for out in runs)) == []


class _EagerRecording:
    """Stands for a recording where there is no GPU: runs what would be replayed."""

    made = 0

    def __init__(self, run: Any, leaves: list[Any], addresses: list[int]) -> None:
        type(self).made += 1
        self.run, self.addresses = run, addresses

    def replay(self, leaves: list[Any]) -> Any:
        return self.run(leaves)


def test_what_is_recorded_when(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once per shape and setting, without gradients only, and anew where a weight was replaced."""
    monkeypatch.setattr(recorded_passes, "_Recording", _EagerRecording)
    monkeypatch.setattr(_EagerRecording, "made", 0)
    network = nn.Linear(2, 3)
    record_passes(network)
    assert isinstance(network.forward, RecordedPasses)
    x = torch.ones(4, 2)
    assert network(x).requires_grad
    assert _EagerRecording.made == 0
    with torch.no_grad():
        first = network(x)
        assert not first.requires_grad
        network.weight.mul_(2)  # in place: as an optimiser's step
        assert not network(input=2 * x).equal(first)  # by keyword
        assert _EagerRecording.made == 2
        network(x)
        network(input=x)
        assert _EagerRecording.made == 2
        network(x[:3])
        assert _EagerRecording.made == 3
        network.weight.data = torch.zeros(3, 2)
        assert network(x).equal(network.bias.expand(4, 3))
        assert _EagerRecording.made == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["clip", "upsampling"])
def test_replays_equal_passes(kind: str) -> None:
    """Of new latents, and of weights that have been written in place or replaced since."""
    from engine.models import ClipGenerator, UpsamplingGenerator, update_spectral_norm

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"resolution": 16, "channels": 32, "multipliers": (2, 1)}
    sizes |= {"num_classes": 3, "compute_dtype": torch.bfloat16}
    network = (
        ClipGenerator(temporal="conv_gru", **sizes)
        if kind == "clip"
        else UpsamplingGenerator(temporal="separable_conv", low_resolution=8, frame_step=2, **sizes)
    ).cuda()
    plain = network.forward
    record_passes(network)
    passes = network.forward
    assert isinstance(passes, RecordedPasses)

    def arguments() -> list[Any]:
        labels = torch.randint(3, (2,), device="cuda")
        low = torch.rand(2, 3, 3, 8, 8, device="cuda")
        return [torch.randn(2, 128, device="cuda"), labels, 4 if kind == "clip" else low]

    seen: list[Tensor] = []
    with torch.no_grad():
        for change in (None, "in place", "replaced"):
            if change == "in place":
                for parameter in network.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)
                update_spectral_norm(network)
            elif change == "replaced":
                weight = next(network.parameters())
                weight.data = weight.data + 0.1
            for _ in range(2):
                given = arguments()
                seen.append(network(*given))
                # bf16 weights that are rounded once or twice differ by 2⁻⁸, a random walk.
                torch.testing.assert_close(seen[-1], plain(*given), rtol=0, atol=0.03)
        assert len(passes._recordings) == 1
    assert recorded_bytes(torch.device("cuda", 0)) > 0
    for a, b in itertools.pairwise(seen):
        assert not a.equal(b)
    video = network(*arguments())
    video.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("by_timing", [True, False])
def test_a_run_says_how_cudnn_chooses(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_timing: bool
) -> None:
    """By timing unless the run shall be repeated bit for bit."""
    for flag in ("benchmark", "deterministic"):  # restored after the test
        monkeypatch.setattr(torch.backends.cudnn, flag, False)
    options = () if by_timing else ("--set", "training.cudnn_benchmark=false")
    tiny.trained(1, tmp_path, "--max-steps", "1", *options)
    assert torch.backends.cudnn.benchmark == by_timing
    assert torch.backends.cudnn.deterministic != by_timing
