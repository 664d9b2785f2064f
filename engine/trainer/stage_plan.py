"""The plan of a run, settled and checked before anything expensive starts.

Read `plan_run`: it is the list of checks, in the order in which they are made. A function named
`refuse_…` raises UserError, in one line, for what its name says; one named `note_…` gives a line
for the user, or None.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine.batches import accumulation_steps, share_among
from engine.configuration import Config, SampleBank, Stage, Training, with_training
from engine.errors import UserError
from engine.trainer.adam import check_adam, whose_adam
from engine.trainer.checkpoints import (
    CHECKPOINTS,
    PARTIAL,
    PREVIOUS,
    Checkpoint,
    find_checkpoint,
    open_checkpoint,
    step_folders,
    step_name,
)
from engine.trainer.logged_steps import last_logged_step
from engine.trainer.previous import check_same_networks
from engine.trainer.ranks import Ranks
from engine.trainer.sample_bank import batches_per_rank

_MAY_CHANGE = (
    *("generator_lr", "discriminator_lr", "adam_betas"),
    *("micro_batch", "zero_stage", "offload_optimizer"),
)
"""Keys of `training` that a resumed run tells when they have changed."""


@dataclass(frozen=True)
class RunOptions:
    """The command line's additions to a configuration."""

    config_name: str
    stage_number: int
    out: Path
    repeated: str = ""
    """Options to repeat in the command for another stage of the same run."""
    resume: str = "auto"
    """auto, none, or the path of a checkpoint."""
    previous: Path | None = None
    max_steps: int | None = None
    """Stop when this many generator updates are done in all."""
    profile_steps: int | None = None
    """How many steps a profile times; None: no profile."""

    @property
    def folder(self) -> Path:
        """Where this stage writes."""
        return self.out / f"stage{self.stage_number}"


@dataclass
class RunPlan:
    """A run that is settled and checked, before anything expensive starts."""

    config: Config
    options: RunOptions
    resume_from: list[Checkpoint] = field(default_factory=list)
    """Candidates, newest first; the first undamaged one is taken."""
    unreadable: list[str] = field(default_factory=list)
    """What is wrong with newer or older checkpoints that are no candidates."""
    checkpoints_seen: tuple[str, ...] = ()
    """Names of the folder's own checkpoints when this was planned, oldest first."""
    previous: Checkpoint | None = None
    """The earlier stage to freeze; None where previous.pt is there already or not needed."""
    previous_file: Path | None = None
    """The resumed run's previous.pt, to be copied; None where that run's folder goes on."""
    notes: list[str] = field(default_factory=list)
    """What the user should know, and what was asked for that this run does not need."""


def plan_run(config: Config, options: RunOptions, ranks: Ranks) -> RunPlan:
    """Check everything that can be checked before data is read and ranks connect.

    Raises UserError with one line.
    """
    number = options.stage_number
    config = settle_batches(config, options, ranks.world_size)
    training = config.stages[number].training
    check_adam(training, ranks.device)
    refuse_profile_of_hidden_blocks(training, options)
    refuse_bf16_on_older_gpus(training, ranks)
    seen = checkpoints_in(options.folder)
    resume_from, unreadable = resume_candidates(options)
    for checkpoint in resume_from[:1]:
        check_same_networks(config, checkpoint, options.config_name, resuming=True)
        refuse_lost_average(checkpoint, training)
        refuse_another_condition(checkpoint, config.stages[number])
    previous, previous_file = find_previous(config, options, resume_from)
    plan = RunPlan(
        config,
        options,
        resume_from,
        unreadable,
        seen,
        previous,
        previous_file,
    )
    notes = (
        note_changes(plan, ranks.world_size),
        note_half_trained_previous(plan),
        note_unused_previous(plan),
        note_rare_classmates(plan),
        note_unused_condition(plan),
    )
    plan.notes += [note for note in notes if note is not None]
    return plan


def checkpoints_in(folder: Path) -> tuple[str, ...]:
    """Names of the checkpoints in a stage's folder, oldest first."""
    return tuple(path.name for path in step_folders(folder / CHECKPOINTS))


def settle_batches(config: Config, options: RunOptions, world_size: int) -> Config:
    """The configuration as `world_size` ranks run it.

    Raises UserError when there is no such stage, or its batch cannot be shared among the ranks.
    """
    number = options.stage_number
    refuse_missing_stage(config, options)
    config = share_among(config, number, world_size)
    refuse_uneven_batches(config.stages[number].training, world_size)
    refuse_single_samples(config, number, world_size)
    return config


def refuse_missing_stage(config: Config, options: RunOptions) -> None:
    """The configuration has no stage of that number."""
    if options.stage_number not in config.stages:
        raise UserError(
            f"--stage {options.stage_number}: {options.config_name} has stages 1 to "
            f"{len(config.stages)}"
        )


def refuse_uneven_batches(training: Training, world_size: int) -> None:
    """The ranks cannot share the global batch, or the bank's videos, in whole micro-batches."""
    accumulation_steps(training, world_size)
    if training.sample_bank is not None:
        batches_per_rank(training.sample_bank, training, world_size)


def refuse_single_samples(config: Config, number: int, world_size: int) -> None:
    """Discriminators that compare a rank's samples get one, perhaps by sharing among many ranks."""
    stage = config.stages[number]
    if stage.discriminators.minibatch_stddev and stage.training.samples_per_pass == 1:
        raise UserError(
            f"stages.{number}.discriminators.minibatch_stddev compares a rank's samples, but "
            f"global_batch {stage.training.global_batch} leaves each of {world_size} processes "
            "one; use fewer processes or a larger global_batch"
        )


def refuse_profile_of_hidden_blocks(training: Training, options: RunOptions) -> None:
    """A profile looks into blocks, which an accelerated network does not run one by one."""
    if options.profile_steps is not None and training.acceleration != "none":
        raise UserError(
            f"--profile looks into blocks, which acceleration={training.acceleration} hides; add "
            f"--set stages.{options.stage_number}.training.acceleration=none"
        )


def refuse_bf16_on_older_gpus(training: Training, ranks: Ranks) -> None:
    """A GPU older than Ampere has no bf16; a CPU's is slow but right."""
    on_gpu = ranks.device.type == "cuda"
    if training.precision == "bf16" and on_gpu and not torch.cuda.is_bf16_supported():
        raise UserError("precision bf16 needs an Ampere GPU or newer; use precision=fp32")


def resume_candidates(options: RunOptions) -> tuple[list[Checkpoint], list[str]]:
    """`RunPlan.resume_from` and `RunPlan.unreadable`.

    Raises UserError where there is nothing to go on from, or checkpoints would be overwritten.
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
        if not existing:
            refuse_lost_checkpoints(options)
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


def refuse_lost_checkpoints(options: RunOptions) -> None:
    """Something was trained here, and what it saved is gone or was never finished."""
    step = last_logged_step(options.folder)
    partial = sorted((options.folder / CHECKPOINTS).glob(f"step-*{PARTIAL}"))
    if step or partial:
        left = f"a log up to step {step}" if step else f"{partial[0].name}, which is not whole"
        raise UserError(
            f"{options.folder} has {left} and no checkpoint to go on from: use --resume none to "
            "start anew, which keeps the log under another name, or another --out"
        )


def refuse_lost_average(checkpoint: Checkpoint, training: Training) -> None:
    """The checkpoint's average of the weights would be lost."""
    number = checkpoint.stage_number
    was = checkpoint.config().stages[number].training.ema_decay
    if was is not None and training.ema_decay is None:
        raise UserError(
            f"{checkpoint.path} was written with ema_decay {was}; "
            f"resume with --set stages.{number}.training.ema_decay={was}"
        )


def refuse_another_condition(checkpoint: Checkpoint, stage: Stage) -> None:
    """The run upsampled real windows before and would upsample generated ones, or the reverse."""
    was = "generated" if checkpoint.meta.previous else "data"
    upsamples = checkpoint.stage_number > 1 and not stage.joint
    if upsamples and was != stage.training.condition_on:
        raise UserError(
            f"{checkpoint.path} was trained with condition_on={was}; "
            f"resume with --condition-on {was}"
        )


def needs_previous(config: Config, number: int) -> bool:
    """Whether this stage's windows come from frozen earlier stages."""
    stage = config.stages[number]
    return number > 1 and not stage.joint and stage.training.condition_on == "generated"


def find_previous(
    config: Config, options: RunOptions, resume_from: Sequence[Checkpoint]
) -> tuple[Checkpoint | None, Path | None]:
    """`RunPlan.previous` and `RunPlan.previous_file`.

    Where the stage needs previous.pt, it stands in the folder already, or beside the checkpoint to
    resume from, or must be made. Raises UserError where the stage before has no checkpoint.
    """
    if not needs_previous(config, options.stage_number):
        return None, None
    if resume_from:
        if (options.folder / PREVIOUS).exists():
            return None, None
        beside = resume_from[0].path.parent.parent / PREVIOUS
        if beside.exists():
            return None, beside
    return _previous_checkpoint(config, options), None


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


def note_changes(plan: RunPlan, world_size: int) -> str | None:
    """What a resumed run does otherwise than before: none of it needs a fresh start."""
    number = plan.options.stage_number
    for checkpoint in plan.resume_from[:1]:
        was, now = checkpoint.config().stages[number].training, plan.config.stages[number].training
        pairs: dict[str, tuple[Any, Any]] = {"ranks": (checkpoint.world_size, world_size)}
        pairs |= {key: (getattr(was, key), getattr(now, key)) for key in _MAY_CHANGE}
        pairs["adam"] = whose_adam(was), whose_adam(now)
        pairs["sample_bank"] = _bank_shown(was.sample_bank), _bank_shown(now.sample_bank)
        changed = [f"{key} {a} -> {b}" for key, (a, b) in pairs.items() if a != b]
        anew = "; latents are drawn anew" if checkpoint.world_size != world_size else ""
        if changed:
            return f"changed since: {', '.join(changed)}{anew}"
    return None


def _bank_shown(bank: SampleBank | None) -> str:
    if bank is None:
        return "none"
    return f"{bank.num_videos} videos, replaced in {bank.refresh_every} iterations"


def note_half_trained_previous(plan: RunPlan) -> str | None:
    """The stage before is frozen before its last iteration."""
    if plan.previous is None:
        return None
    before, step = plan.previous.stage_number, plan.previous.step
    iterations = plan.previous.config().stages[before].training.iterations
    if step >= iterations:
        return None
    return f"stage {before} is frozen after {step} of {iterations} iterations"


def note_unused_previous(plan: RunPlan) -> str | None:
    """--previous was given to a run that does without."""
    if not plan.options.previous or plan.previous is not None:
        return None
    reason = "a resumed run keeps its own" if plan.resume_from else "no frozen stage is needed"
    return f"--previous is not used: {reason}"


def note_rare_classmates(plan: RunPlan) -> str | None:
    """Discriminators compare samples of one class, and a micro-batch holds few of them."""
    stage = plan.config.stages[plan.options.stage_number]
    num_classes, batch = plan.config.data.num_classes, stage.training.samples_per_pass
    if not (stage.discriminators.minibatch_stddev and num_classes and batch <= num_classes):
        return None
    met = 1 - (1 - 1 / num_classes) ** (batch - 1)
    return (
        f"minibatch_stddev: of {num_classes} classes in micro-batches of {batch}, a sample "
        f"meets another of its class in {met:.0%} of them"
    )


def note_unused_condition(plan: RunPlan) -> str | None:
    """condition_on=data was set for a stage that upsamples no frozen one."""
    stage = plan.config.stages[plan.options.stage_number]
    upsamples = plan.options.stage_number > 1 and not stage.joint
    if stage.training.condition_on != "data" or upsamples:
        return None
    return "condition_on=data is not used: this stage upsamples no frozen one"


def with_micro_batch_of(checkpoint: Checkpoint, config: Config, number: int) -> Config:
    """The configuration with the micro-batch that a resumed run has."""
    trained = checkpoint.config().stages[number].training
    return with_training(config, number, micro_batch=trained.micro_batch)
