"""Saving the state of a run into a checkpoint, and loading it back."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from engine.errors import UserError
from engine.models.cascade import JointGenerator
from engine.trainer.averaging import with_own_vectors
from engine.trainer.checkpoint_meta import (
    GENERATOR,
    Evaluated,
    RunFacts,
    rank_file,
    shard_file,
)
from engine.trainer.checkpoints import Checkpoint, read_tensors
from engine.trainer.deepspeed_engines import whole_state
from engine.trainer.engine_state import check_shards, load_shards, numel, shard_of
from engine.trainer.host_copies import KeptCopies, new_copy
from engine.trainer.networks import StageBuilder
from engine.trainer.step import Trainer

State = dict[str, torch.Tensor]


def run_contents(
    trainer: Trainer, builder: StageBuilder, copies: KeptCopies | None = None
) -> dict[str, Callable[[], Any]]:
    """This rank's files of a checkpoint: functions of copies that are made here. Collective.

    With `copies`, in its memory.
    """
    ranks = builder.ranks
    zero_stage = builder.config.stages[builder.number].training.zero_stage
    contents: dict[str, Callable[[], Any]] = {}
    for name, engine in _engines(trainer):
        copy = copies.under(name) if copies else new_copy
        shard = shard_of(engine, zero_stage=zero_stage, rank=ranks.rank, copy=copy)
        contents[shard_file(name, ranks.rank)] = partial(_given, shard)
    contents[rank_file(ranks.rank)] = partial(_given, _rank_state(trainer))
    copy = copies.under("whole") if copies else new_copy
    weights = whole_state(
        trainer.g_engine.module, zero_stage=zero_stage, keep=ranks.is_main, copy=copy
    )
    if ranks.is_main:
        copy = copies.under("average") if copies else new_copy
        average = trainer.average.state_dict(copy) if trainer.average else None
        contents[GENERATOR] = partial(_generator_file, trainer, weights, average)
    return contents


def _given(value: Any) -> Any:
    return value


def least_bytes(trainer: Trainer) -> int:
    """What a checkpoint takes at least, of all ranks: float32 weights, and two moments of each.

    And the generator's weights again, for sampling. Buffers, random states and an average come on
    top of that: a disk that is refused is certainly too small.
    """
    updated = [p for _, engine in _engines(trainer) for p in engine.module.parameters()]
    sampled = trainer.g_engine.module.parameters()
    return sum(3 * 4 * numel(p) for p in updated) + sum(
        p.element_size() * numel(p) for p in sampled
    )


def run_facts(builder: StageBuilder, evaluated: Evaluated | None = None) -> RunFacts:
    """The part of meta.json that describes a run, besides its step and files."""
    return RunFacts(
        stage=builder.number,
        world_size=builder.ranks.world_size,
        zero_stage=builder.config.stages[builder.number].training.zero_stage,
        # Hashed once: it is written when the stage starts and never changes.
        previous=None if builder.previous is None else builder.previous.digest,
        config=builder.config.to_tree(),
        classes=list(builder.facts.classes),
        class_counts=list(builder.facts.class_counts),
        frames_per_second=builder.frames_per_second,
        evaluation=evaluated,
    )


def load_run(trainer: Trainer, builder: StageBuilder, checkpoint: Checkpoint) -> None:
    """Restore what was written of `run_contents`, on however many ranks. Collective.

    Rank 0 has verified the files.

    As many ranks as wrote it go on with the same random numbers, bit for bit. Others draw new
    ones; weights, moments, buffers and clips go on where they were.
    """
    ranks = builder.ranks
    zero_stage = builder.config.stages[builder.number].training.zero_stage
    for name, engine in _engines(trainer):
        files = [checkpoint.path / shard_file(name, n) for n in range(checkpoint.world_size)]
        shards = [read_tensors(file, mapped=True) for file in files]
        check_shards(engine.module, shards, f"{checkpoint.path}/{name}")
        load_shards(engine, shards, zero_stage=zero_stage)
    same_ranks = ranks.world_size == checkpoint.world_size
    state = checkpoint.read(rank_file(ranks.rank if same_ranks else 0))
    trainer.load_state_dict(state["trainer"])
    if same_ranks:
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
    else:
        trainer.reseed(builder.resumed_seed(trainer.step))
    if trainer.average is not None:
        average = checkpoint.read(GENERATOR)["average"]
        if average is None:
            raise UserError(f"{checkpoint.path} was written without ema_decay; resume without it")
        trainer.average.load_state_dict(average)


def _engines(trainer: Trainer) -> tuple[tuple[str, Any], ...]:
    return ("generator", trainer.g_engine), ("discriminators", trainer.d_engine)


def _rank_state(trainer: Trainer) -> dict[str, Any]:
    # The step draws from its own generator; the global ones are kept for what a user may add.
    return {
        "trainer": trainer.state_dict(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _generator_file(trainer: Trainer, weights: State, average: State | None) -> dict[str, Any]:
    """State dicts by stage, as sampling and later stages read them; averaged where kept."""
    return {"generators": generators_for_use(trainer, weights, average), "average": average}


def generators_for_use(trainer: Trainer, weights: State, average: State | None) -> dict[int, State]:
    """What the run has trained, by stage: the average of the weights where it keeps one."""
    used = weights if average is None else with_own_vectors(average)
    if not isinstance(trainer.g_engine.module, JointGenerator):
        return {trainer.stage_number: used}
    return {
        number: {
            name.removeprefix(prefix): value
            for name, value in used.items()
            if name.startswith(prefix)
        }
        for number in range(1, trainer.stage_number + 1)
        for prefix in (f"generators.{number - 1}.",)
    }
