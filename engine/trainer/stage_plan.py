"""What a run will do, settled and checked before anything expensive starts."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine.configuration import (
    Config,
    Training,
    accumulation_steps,
    share_among,
    with_training,
)
from engine.errors import UserError
from engine.trainer.adam import check_adam, whose_adam
from engine.trainer.checkpoints import (
    CHECKPOINTS,
    PREVIOUS,
    Checkpoint,
    find_checkpoint,
    open_checkpoint,
    step_folders,
    step_name,
)
from engine.trainer.previous import check_same_networks
from engine.trainer.ranks import Ranks
from engine.trainer.sample_bank import batches_per_rank


@dataclass(frozen=True)
class RunOptions:
    """What the command line adds to a configuration."""

    config_name: str
    stage_number: int
    out: Path
    repeated: str = ""
    """The options that a command for another stage of the same run repeats."""
    resume: str = "auto"
    """auto, none, or the path of a checkpoint."""
    previous: Path | None = None
    max_steps: int | None = None
    """Stop when this many generator updates are done in all."""
    profile_steps: int | None = None
    """How many steps a profile times; None without one."""

    @property
    def folder(self) -> Path:
        """Where this stage writes."""
        return self.out / f"stage{self.stage_number}"


@dataclass
class Plan:
    """What a run will do, settled before anything expensive starts."""

    config: Config
    options: RunOptions
    resume_from: list[Checkpoint] = field(default_factory=list)
    """Candidates, newest first; the first undamaged one is taken."""
    unreadable: list[str] = field(default_factory=list)
    """What is wrong with newer or older checkpoints that are no candidates."""
    previous: Checkpoint | None = None
    """The earlier stage to freeze; None where previous.pt is there already or not needed."""
    previous_file: Path | None = None
    """The resumed run's previous.pt, to be copied; None where that run's folder goes on."""
    notes: list[str] = field(default_factory=list)
    """What the user asked for and this run does not need."""


def plan_run(config: Config, options: RunOptions, ranks: Ranks) -> Plan:
    """Check everything that can be checked without data, devices or other ranks.

    Raises UserError with one line.
    """
    number = options.stage_number
    config = settle_batches(config, options, ranks.world_size)
    stage = config.stages[number]
    condition_on = stage.training.condition_on
    check_adam(stage.training, ranks.device)
    acceleration = stage.training.acceleration
    if options.profile_steps is not None and acceleration != "none":
        raise UserError(
            f"--profile looks into blocks, which acceleration={acceleration} hides; add --set "
            f"stages.{number}.training.acceleration=none"
        )
    on_gpu = ranks.device.type == "cuda"  # a CPU's bf16 is slow but right
    if stage.training.precision == "bf16" and on_gpu and not torch.cuda.is_bf16_supported():
        raise UserError("precision bf16 needs an Ampere GPU or newer; use precision=fp32")
    plan = Plan(config, options, *resume_candidates(options))
    for checkpoint in plan.resume_from[:1]:
        check_same_networks(config, checkpoint, options.config_name, resuming=True)
        if checkpoint.world_size != ranks.world_size:
            raise UserError(
                f"{checkpoint.path} was written with world size {checkpoint.world_size}; "
                f"resume with as many processes, not {ranks.world_size}"
            )
        _check_same_form(checkpoint, stage.training)
        if number > 1 and not stage.joint and _was_conditioned_on(checkpoint) != condition_on:
            raise UserError(
                f"{checkpoint.path} was trained with condition_on="
                f"{_was_conditioned_on(checkpoint)}; resume with --condition-on "
                f"{_was_conditioned_on(checkpoint)}"
            )
        _note_another_bank(plan, checkpoint)
    if needs_previous(config, number):
        _settle_previous(plan)
    if plan.previous is not None:
        before, step = plan.previous.stage_number, plan.previous.step
        iterations = plan.previous.config().stages[before].training.iterations
        if step < iterations:
            plan.notes.append(f"stage {before} is frozen after {step} of {iterations} iterations")
    if options.previous and plan.previous is None:
        reason = "a resumed run keeps its own" if plan.resume_from else "no frozen stage is needed"
        plan.notes.append(f"--previous is not used: {reason}")
    num_classes, batch = config.data.num_classes, stage.training.samples_per_pass
    if stage.discriminators.minibatch_stddev and num_classes and batch <= num_classes:
        met = 1 - (1 - 1 / num_classes) ** (batch - 1)
        plan.notes.append(
            f"minibatch_stddev: of {num_classes} classes in micro-batches of {batch}, a sample "
            f"meets another of its class in {met:.0%} of them"
        )
    if condition_on == "data" and (number == 1 or stage.joint):
        plan.notes.append("condition_on=data is not used: this stage upsamples no frozen one")
    return plan


def _note_another_bank(plan: Plan, checkpoint: Checkpoint) -> None:
    """A configuration may have got one since the run began: it changes what is trained on."""
    number = plan.options.stage_number
    was = checkpoint.config().stages[number].training.sample_bank
    now = plan.config.stages[number].training.sample_bank
    if was != now:
        shown = [
            "none"
            if bank is None
            else f"{bank.num_videos} videos, replaced in {bank.refresh_every} iterations"
            for bank in (was, now)
        ]
        plan.notes.append(f"changed since: sample_bank {shown[0]} -> {shown[1]}")


def resume_candidates(options: RunOptions) -> tuple[list[Checkpoint], list[str]]:
    """What `Plan.resume_from` and `Plan.unreadable` say.

    Raises UserError where there is nothing to go on from, or something not to be lost.
    """
    existing = step_folders(options.folder / CHECKPOINTS)
    if options.resume == "auto":
        readable: list[Checkpoint] = []
        unreadable: list[str] = []
        for path in reversed(existing):
            try:
                readable.append(open_checkpoint(path))
            except UserError as error:
                unreadable.append(str(error))
        if existing and not readable:  # not a fresh start: the user should know
            raise UserError(unreadable[0])
        return readable, unreadable
    if options.resume == "none":
        if existing:
            raise UserError(
                f"{options.folder} already holds checkpoints up to {existing[-1].name}: "
                "use --resume auto to go on, or another --out to start anew"
            )
        return [], []
    chosen = find_checkpoint(Path(options.resume), stage_number=options.stage_number)
    if existing and existing[-1].name > step_name(chosen.step):
        # Two lines of training in one folder: --resume auto would go on with the other one.
        raise UserError(
            f"{options.folder} holds checkpoints up to {existing[-1].name}, newer than "
            f"{chosen.path}: resume it with another --out, or remove the newer ones"
        )
    return [chosen], []


def with_micro_batch_of(checkpoint: Checkpoint, config: Config, number: int) -> Config:
    """The configuration with the micro-batch that a resumed run has."""
    trained = checkpoint.config().stages[number].training
    return with_training(config, number, micro_batch=trained.micro_batch)


def settle_batches(config: Config, options: RunOptions, world_size: int) -> Config:
    """The configuration as `world_size` ranks run it.

    Raises UserError when there is no such stage, or its batch cannot be shared among the ranks.
    """
    number = options.stage_number
    if number not in config.stages:
        raise UserError(
            f"--stage {number}: {options.config_name} has stages 1 to {len(config.stages)}"
        )
    config = share_among(config, number, world_size)
    training = config.stages[number].training
    accumulation_steps(training, world_size)
    if training.sample_bank is not None:
        batches_per_rank(training.sample_bank, training, world_size)
    statistics = config.stages[number].discriminators.minibatch_stddev
    if statistics and training.samples_per_pass == 1:  # perhaps by sharing among many ranks
        raise UserError(
            f"stages.{number}.discriminators.minibatch_stddev compares a rank's samples, but "
            f"global_batch {training.global_batch} leaves each of {world_size} processes one; use "
            "fewer processes or a larger global_batch"
        )
    return config


def _check_same_form(checkpoint: Checkpoint, training: Training) -> None:
    """UserError where what was saved has another form than this run's: the optimizer's state, the
    loader's position, the average that would be lost."""
    number = checkpoint.stage_number
    trained = checkpoint.config().stages[number].training
    settings: dict[str, tuple[Any, Any]] = {
        "zero_stage": (trained.zero_stage, training.zero_stage),
        "adam": (whose_adam(trained), whose_adam(training)),
        "offload_optimizer": (trained.offload_optimizer, training.offload_optimizer),
        "micro_batch": (trained.micro_batch, training.micro_batch),
    }
    if training.ema_decay is None:
        settings["ema_decay"] = trained.ema_decay, None
    for key, (was, now) in settings.items():
        if was != now:
            value = str(was).lower()  # YAML's true and false
            raise UserError(
                f"{checkpoint.path} was written with {key} {value}; "
                f"resume with --set stages.{number}.training.{key}={value}"
            )


def needs_previous(config: Config, number: int) -> bool:
    """Whether this stage's windows come from frozen earlier stages."""
    stage = config.stages[number]
    return number > 1 and not stage.joint and stage.training.condition_on == "generated"


def _settle_previous(plan: Plan) -> None:
    """previous.pt stands in the folder, or beside the resumed checkpoint, or must be made."""
    if plan.resume_from:
        if (plan.options.folder / PREVIOUS).exists():
            return
        beside = plan.resume_from[0].path.parent.parent / PREVIOUS
        if beside.exists():
            plan.previous_file = beside
            return
    plan.previous = _previous_checkpoint(plan.config, plan.options)


def _was_conditioned_on(checkpoint: Checkpoint) -> str:
    return "generated" if checkpoint.meta["previous"] else "data"


def _previous_checkpoint(config: Config, options: RunOptions) -> Checkpoint:
    before = options.stage_number - 1
    source = options.previous or options.out
    try:
        found = find_checkpoint(source, stage_number=before)
    except UserError as error:
        raise UserError(
            f"stage {options.stage_number} needs stage {before} first ({error}); "
            f"make it with: deepspeed engine/train.py --stage {before}{options.repeated}"
        ) from None
    check_same_networks(config, found, options.config_name)
    return found
