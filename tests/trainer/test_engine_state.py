"""Shards of a network's state: what is not all of it, once, is refused before anything changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_runs import Tiny
from small_trainers import make

from engine.errors import UserError
from engine.trainer.engine_state import (
    KEYS,
    check_shards,
    load_shards,
    own_pieces,
    shard_of,
)
from engine.trainer.ranks import Ranks
from engine.trainer.step import Trainer

Shards = list[dict[str, Any]]


@pytest.fixture(scope="module")
def trainer(tiny: Tiny) -> Trainer:
    ranks = Ranks.from_environment()
    ranks.connect()
    return make(ranks, tiny.config())


@pytest.fixture
def shard(trainer: Trainer) -> dict[str, Any]:
    return shard_of(trainer.g_engine, zero_stage=1, rank=0)


def cut(shard: dict[str, Any], name: str, at: int) -> Shards:
    """The shards of two ranks, of which the second begins within a parameter."""
    first: dict[str, Any] = {**shard, "starts": dict(shard["starts"])}
    first["values"] = {key: dict(shard["values"][key]) for key in KEYS}
    second: dict[str, Any] = {"step": shard["step"], "starts": {name: at}, "buffers": {}}
    second["values"] = {key: {name: shard["values"][key][name][at:]} for key in KEYS}
    for key in KEYS:
        first["values"][key][name] = shard["values"][key][name][:at]
    return [first, second]


def test_moments_are_there_before_the_first_step(shard: dict[str, Any]) -> None:
    """A run may be stopped before it; the step that makes them counts for nothing."""
    assert shard["step"] == 0
    assert all(not row.any() for key in KEYS[1:] for row in shard["values"][key].values())
    assert any(row.any() for row in shard["values"]["weight"].values())


def test_what_was_cut_within_a_parameter_is_put_together(
    trainer: Trainer, shard: dict[str, Any]
) -> None:
    name = max(shard["starts"], key=lambda each: shard["values"]["weight"][each].numel())
    generator = torch.Generator().manual_seed(0)
    for key in KEYS:
        for row in shard["values"][key].values():
            row.copy_(torch.rand(row.shape, generator=generator))
    shards = cut(shard, name, 3)
    check_shards(trainer.g_engine.module, shards, "DIR")
    load_shards(trainer.g_engine, [{**each, "step": 7} for each in shards], zero_stage=1)
    again = shard_of(trainer.g_engine, zero_stage=1, rank=0)
    assert again["step"] == 7
    for key in KEYS:
        assert again["values"][key].keys() == shard["values"][key].keys()
        for each, row in again["values"][key].items():
            assert row.equal(shard["values"][key][each])
    for each, parameter in trainer.g_engine.module.named_parameters():
        assert parameter.flatten().equal(shard["values"]["weight"][each])
    assert own_pieces(trainer.g_engine, zero_stage=1)[name].start == 0


def drop(shards: Shards, name: str) -> None:
    del shards[1]["starts"][name]
    for key in KEYS:
        del shards[1]["values"][key][name]


def shift(shards: Shards, name: str) -> None:
    shards[1]["starts"][name] -= 1


def rename(shards: Shards, name: str) -> None:
    shards[0]["starts"]["other"] = 0
    for key in KEYS:
        shards[0]["values"][key]["other"] = torch.zeros(2)


def lose_a_buffer(shards: Shards, name: str) -> None:
    shards[0]["buffers"].pop(min(shards[0]["buffers"]))


def flatten_a_buffer(shards: Shards, name: str) -> None:
    buffers = shards[0]["buffers"]
    buffers[min(buffers)] = torch.zeros(99)


def mix_steps(shards: Shards, name: str) -> None:
    shards[1]["step"] = 5


def halve(shards: Shards, name: str) -> None:
    values = shards[0]["values"]["exp_avg"]
    values[min(values)] = values[min(values)].half()


def lose_moments(shards: Shards, name: str) -> None:
    del shards[0]["values"]["exp_avg"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop, "does not hold all of {name}, once (weight; "),
        (shift, "does not hold all of {name}, once (weight; "),
        (rename, "holds other, which the network lacks"),
        (lose_a_buffer, "lacks the buffer "),
        (flatten_a_buffer, "as torch.float32 [99]"),
        (mix_steps, "is of several steps"),
        (halve, "holds no shard of a network (rank 0)"),
        (lose_moments, "holds no shard of a network (rank 0)"),
    ],
)
def test_what_is_not_the_networks_state_is_refused(
    trainer: Trainer,
    shard: dict[str, Any],
    damage: Callable[[Shards, str], None],
    message: str,
) -> None:
    name = max(shard["starts"], key=lambda each: shard["values"]["weight"][each].numel())
    shards = cut(shard, name, 3)
    damage(shards, name)
    with pytest.raises(UserError) as caught:
        check_shards(trainer.g_engine.module, shards, "DIR/generator")
    assert str(caught.value).startswith("DIR/generator ")
    assert message.format(name=name) in str(caught.value)
