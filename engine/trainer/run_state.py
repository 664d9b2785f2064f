"""Saving the state of a run into a checkpoint, and loading it back."""

from pathlib import Path
from typing import Any

import torch

from engine.configuration import Training
from engine.errors import UserError
from engine.models.cascade import JointGenerator
from engine.trainer.checkpoints import GENERATOR, Checkpoint, save_tensors, write_checkpoint
from engine.trainer.deepspeed_engines import whole_state
from engine.trainer.networks import StageBuilder
from engine.trainer.ranks import Ranks
from engine.trainer.retention import Evaluated, keep_newest_and_best
from engine.trainer.step import Trainer

_TAG = "state"  # DeepSpeed wants a folder name of its own inside ours


def save_run(
    trainer: Trainer, builder: StageBuilder, *, folder: Path, evaluated: Evaluated | None = None
) -> Path:
    """Write a checkpoint of the whole run under `folder`, and remove old ones. Collective.

    `evaluated` is what rank 0 knows of this very step.
    """
    ranks = builder.ranks
    found = {"evaluation": evaluated and evaluated.to_tree()}
    checkpoint = write_checkpoint(
        folder,
        step=trainer.step,
        write_files=lambda path: write_run_files(trainer, builder, path),
        meta=run_meta(builder) | found,
        is_main=ranks.is_main,
        barrier=ranks.barrier,
    )
    if ranks.is_main:
        keep = builder.config.stages[builder.number].training.keep_checkpoints
        keep_newest_and_best(checkpoint, keep)
    return checkpoint


def write_run_files(trainer: Trainer, builder: StageBuilder, path: Path) -> None:
    """This rank's files of a checkpoint, into the folder `path`. Collective."""
    ranks = builder.ranks
    zero_stage = builder.config.stages[builder.number].training.zero_stage
    for name, engine in _engines(trainer):
        engine.save_checkpoint(str(path / name), tag=_TAG, save_latest=False)
        if ranks.is_main:
            for script in (path / name).glob("*.py"):
                script.unlink()  # recovery scripts, which would unpickle without checks
    weights = whole_state(trainer.g_engine.module, zero_stage=zero_stage, keep=ranks.is_main)
    save_tensors(path / rank_file(ranks.rank), _rank_state(trainer))
    if ranks.is_main:
        average = trainer.average.state_dict() if trainer.average else None
        save_tensors(path / GENERATOR, _generator_file(trainer, weights, average))


def run_meta(builder: StageBuilder) -> dict[str, Any]:
    """The part of meta.json that describes a run, besides its step and files."""
    return {
        "stage": builder.number,
        "world_size": builder.ranks.world_size,
        "zero_stage": builder.config.stages[builder.number].training.zero_stage,
        # Hashed once: it is written when the stage starts and never changes.
        "previous": builder.previous and builder.previous.digest,
        "config": builder.config.to_tree(),
        "classes": list(builder.facts.classes),
        "class_counts": list(builder.facts.class_counts),
        "frames_per_second": builder.frames_per_second,
    }


def load_run(trainer: Trainer, checkpoint: Checkpoint, ranks: Ranks) -> None:
    """Restore what `save_run` wrote. Collective; files have been verified by rank 0."""
    for name, engine in _engines(trainer):
        loaded, _ = engine.load_checkpoint(str(checkpoint.path / name), tag=_TAG)
        if loaded is None:  # DeepSpeed only logs it, and would go on from scratch
            raise UserError(f"{checkpoint.path}/{name} could not be loaded")
    state = checkpoint.read(rank_file(ranks.rank))
    trainer.load_state_dict(state["trainer"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if trainer.average is not None:
        average = checkpoint.read(GENERATOR)["average"]
        if average is None:
            raise UserError(f"{checkpoint.path} was written without ema_decay; resume without it")
        trainer.average.load_state_dict(average)


def apply_optimizer_settings(trainer: Trainer, training: Training) -> list[str]:
    """Set both Adams' learning rate and betas as configured; returns what changed, for the user.

    Due after `load_run`, which restores the checkpoint's with the optimizers' moments.
    """
    rates = {"generator": training.generator_lr, "discriminators": training.discriminator_lr}
    changes: dict[str, None] = {}  # a set that keeps the order
    for name, engine in _engines(trainer):
        settings = {"lr": rates[name], "betas": training.adam_betas}
        for group in engine.optimizer.param_groups:
            changed = {k: v for k, v in settings.items() if group[k] != v}
            changes |= {f"{name} {k} {group[k]} -> {v}": None for k, v in changed.items()}
            group |= changed
    return list(changes)


def _engines(trainer: Trainer) -> tuple[tuple[str, Any], ...]:
    return ("generator", trainer.g_engine), ("discriminators", trainer.d_engine)


def rank_file(rank: int) -> str:
    """A rank's own file of a checkpoint."""
    return f"rank-{rank:05d}.pt"


def _rank_state(trainer: Trainer) -> dict[str, Any]:
    # The step draws from its own generator; the global ones are kept for what a user may add.
    return {
        "trainer": trainer.state_dict(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _generator_file(
    trainer: Trainer, weights: dict[str, torch.Tensor], average: dict[str, torch.Tensor] | None
) -> dict[str, Any]:
    """State dicts by stage, as sampling and later stages read them; averaged where kept."""
    return {"generators": generators_for_use(trainer, weights), "average": average}


def generators_for_use(
    trainer: Trainer, weights: dict[str, torch.Tensor]
) -> dict[int, dict[str, torch.Tensor]]:
    """What the run has trained, by stage: the average of the weights where it keeps one."""
    used = trainer.average.generator_state() if trainer.average else weights
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
