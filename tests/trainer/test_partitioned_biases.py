"""ZeRO-3 where no parameter stays whole: layers hand biases on to operators outside themselves."""

from typing import Any

import pytest
import torch
from small_runs import Tiny
from small_trainers import make

from engine.trainer import deepspeed_engines
from engine.trainer.ranks import Ranks
from engine.trainer.step import Trainer

NOTHING_WHOLE = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
}


def trained(ranks: Ranks, tiny: Tiny, number: int, zero_stage: int) -> tuple[Trainer, list[float]]:
    """A trainer after two steps, and its losses."""
    config = tiny.config(f"training.zero_stage={zero_stage}", "training.precision=fp32")
    torch.manual_seed(0)
    trainer = make(ranks, config, number)
    measures = [trainer.train_step() for _ in range(2)]
    return trainer, [float(step[name]) for step in measures for name in ("loss_D", "loss_G")]


@pytest.mark.parametrize("number", [1, 2])  # a ConvGRU's gates; shortcuts and x_l's projections
def test_training_is_as_without_partitions(
    ranks: Ranks, tiny: Tiny, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, expected = trained(ranks, tiny, number, 0)
    settings = deepspeed_engines.deepspeed_settings

    def none_whole(*arguments: Any, **named: Any) -> dict[str, Any]:
        made = settings(*arguments, **named)
        made["zero_optimization"] |= NOTHING_WHOLE
        return made

    monkeypatch.setattr(deepspeed_engines, "deepspeed_settings", none_whole)
    trainer, got = trained(ranks, tiny, number, 3)
    biases = [p for n, p in trainer.g_engine.module.named_parameters() if n.endswith("bias")]
    assert biases
    assert all(bias.numel() == 0 for bias in biases)
    # Divided one by one, weights are rounded otherwise, by an ulp or two.
    assert got == pytest.approx(expected, rel=1e-5)
