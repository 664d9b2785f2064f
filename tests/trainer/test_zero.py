"""ZeRO 0 to 3 on two ranks (CPU, gloo): the same training, sharded, saved and resumed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import Tiny, contents, differences, logged, two_ranks
from torch import Tensor

from engine.models.construction import build_generator

ZERO_STAGES = (0, 1, 2, 3)
RUNS = [(1, zero) for zero in ZERO_STAGES] + [(2, 1), (2, 3)]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By ZeRO stage: 'whole' trained two steps, 'parts' resumed from its first."""
    folder = tmp_path_factory.mktemp("zero")
    fixed = ["--max-steps", "2", "--set", "training.checkpoint_every=1"]
    # Half of the global batch per rank, in two micro-batches: accumulation and sharding together.
    fixed += ["--set", "training.micro_batch=1", "--set", "training.ema_decay=0.5"]
    runs = []
    for stage, zero in RUNS:
        whole, parts = (folder / f"zero{zero}" / name for name in ("whole", "parts"))
        more = [*fixed, "--set", f"training.zero_stage={zero}"]
        if stage == 2:
            more += ["--previous", str(folder / "zero1/whole")]
        first = whole / f"stage{stage}" / "checkpoints/step-00000001"
        runs += [
            tiny.options(stage, whole, *more),
            tiny.options(stage, parts, *more, "--resume", first),
        ]
    file = folder / "runs.json"
    file.write_text(json.dumps(runs))
    finished = two_ranks("tests/trainer/several_runs.py", file)
    assert finished.code == 0, finished.out + finished.err
    return {zero: folder / f"zero{zero}" for zero in ZERO_STAGES}


def checkpoint(out: Path, stage: int, step: int) -> Path:
    return out / f"stage{stage}" / "checkpoints" / f"step-{step:08d}"


def generator(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path / "generator.pt", weights_only=True)
    return state


@pytest.mark.parametrize(("stage", "zeros"), [(1, ZERO_STAGES), (2, (1, 3))])
def test_every_zero_stage_trains_the_same(
    outs: dict[int, Path], stage: int, zeros: tuple[int, ...]
) -> None:
    """Sharding changes the order of sums, not the algorithm.

    Two ranks' gradients are added (a sum of two has one order) and Adam works element by element,
    so only sums within a kernel and over micro-batches differ: a few roundings, which the second
    step's losses see through some 20 layers: 20 eps. Where a gradient's terms cancel its relative
    error grows, and Adam's update is relative: a weight may be off by a thousandth of its updates
    and two roundings.

    The exception: a bias in front of a frame norm, which subtracts it, has no gradient but
    rounding. Adam divides that by its own size, so such biases wander by up to lr a step.
    """
    tolerance = 20 * torch.finfo(torch.float32).eps
    updates = 2 * 1e-4  # lr, twice
    wander = 2 * updates  # two runs
    first, *others = (outs[zero] / "whole" for zero in zeros)
    log = logged(first / f"stage{stage}")
    assert [line["step"] for line in log] == [1, 2]
    assert log[0]["loss_G"] != log[1]["loss_G"]
    weights = generator(checkpoint(first, stage, 2))["generators"][stage]
    for other in others:
        assert logged(other / f"stage{stage}") == [
            pytest.approx(line, rel=tolerance, abs=tolerance) for line in log
        ]
        compared = generator(checkpoint(other, stage, 2))["generators"][stage]
        assert compared.keys() == weights.keys()
        for name, value in weights.items():
            normalized_away = name.startswith("units.") and name.endswith("bias")
            atol = wander if normalized_away else 1e-3 * updates + 2.4e-7
            error = (compared[name] - value).abs().max().item()
            assert error <= atol, (name, error, atol)


@pytest.mark.parametrize(("stage", "zero"), RUNS)
def test_resumed_run_equals_an_uninterrupted_one(
    outs: dict[int, Path], stage: int, zero: int
) -> None:
    whole, parts = (checkpoint(outs[zero] / name, stage, 2) for name in ("whole", "parts"))
    held = contents(whole)
    # ZeRO-0 keeps the optimizer with the model; the others a shard per rank.
    num_shards = sum("optim_states" in name for name in held)
    assert num_shards == (0 if zero == 0 else 4)
    assert {"rank-00000.pt", "rank-00001.pt"} <= held.keys()
    assert differences(held, contents(parts)) == []
    assert logged(parts.parent.parent) == logged(whole.parent.parent)[1:]


def test_generator_file_is_whole(outs: dict[int, Path], tiny: Tiny) -> None:
    """Unsharded at ZeRO-3 too: the same names and shapes, and not the first step's values."""
    network = build_generator(tiny.config(), 1)
    expected = {name: value.shape for name, value in network.state_dict().items()}
    for zero in ZERO_STAGES:
        first, second = (
            generator(checkpoint(outs[zero] / "whole", 1, step))["generators"][1] for step in (1, 2)
        )
        shapes = {name: value.shape for name, value in second.items()}
        assert shapes == expected
        assert len(differences(first, second)) > 10


def test_ranks_see_different_clips_and_noise(outs: dict[int, Path]) -> None:
    held = contents(checkpoint(outs[1] / "whole", 1, 2))
    states: list[dict[str, Tensor]] = [held[f"rank-0000{n}.pt"]["trainer"] for n in (0, 1)]
    assert not states[0]["random"].equal(states[1]["random"])
    assert states[0]["reals"] == states[1]["reals"]  # the position counts both ranks' clips
