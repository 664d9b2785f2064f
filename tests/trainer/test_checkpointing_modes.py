"""Training steps are the same bit for bit, whatever activations are kept."""

from pathlib import Path

import pytest
import torch
from small_runs import Tiny, contents, differences, logged
from test_step import make, vectors, weights
from torch import Tensor

from engine.trainer.ranks import Ranks

MODES = ("none", "norms", "blocks")


@pytest.mark.parametrize(
    ("number", "overrides"),
    [
        (1, ("training.zero_stage=0",)),
        (2, ("training.zero_stage=1", "training.micro_batch=2")),
        (2, ("training.zero_stage=2", "stages.2.joint=true")),
    ],
    ids=["stage 1", "stage 2", "joint"],
)
def test_two_steps(tiny: Tiny, ranks: Ranks, number: int, overrides: tuple[str, ...]) -> None:
    """Spectral norm moves and frames are drawn between the passes."""
    found = []
    for mode in MODES:
        trainer = make(ranks, tiny.config(*overrides, f"training.checkpointing={mode}"), number)
        networks = trainer.g_engine.module, trainer.d_engine.module
        before = [vectors(network) for network in networks]
        measures = [trainer.train_step() for _ in range(2)]
        after = [vectors(network) for network in networks]
        assert all(differences(b, a) for b, a in zip(before, after, strict=True))
        found.append((measures, after, [weights(network) for network in networks]))
    assert found[0][0][0]["loss_G"] != found[0][0][1]["loss_G"]
    for other in found[1:]:
        assert differences(found[0], other) == []


@pytest.mark.slow
def test_partitioned_weights(tiny: Tiny, ranks: Ranks) -> None:
    """ZeRO-3 gathers a block's weights again when it is computed again."""
    found: list[tuple[list[dict[str, float]], dict[str, Tensor]]] = []
    for mode in ("norms", "blocks"):
        config = tiny.config("training.zero_stage=3", f"training.checkpointing={mode}")
        trainer = make(ranks, config, 2)
        measures = [trainer.train_step() for _ in range(2)]
        found.append((measures, vectors(trainer.g_engine.module)))
    assert differences(*found) == []


def test_a_run_goes_on_in_another_mode(tiny: Tiny, tmp_path: Path) -> None:
    every = ("--set", "training.checkpoint_every=1", "--set")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = tiny.trained(1, whole, "--max-steps", "2", *every, "training.checkpointing=none")
    tiny.trained(1, parts, "--max-steps", "1", *every, "training.checkpointing=none")
    got = tiny.trained(1, parts, "--max-steps", "2", *every, "training.checkpointing=blocks")
    assert differences(contents(expected), contents(got)) == []
    assert logged(parts / "stage1") == logged(whole / "stage1")
    assert torch.load(got / "generator.pt", weights_only=True)["generators"][1]
