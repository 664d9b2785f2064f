"""One run of one stage, from a checked configuration to the last checkpoint."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from engine.durable_files import put_in_place, writing
from engine.errors import UserError
from engine.models.construction import compute_dtype
from engine.trainer.acceleration import accelerate, choose_convolutions
from engine.trainer.checkpoint_meta import Evaluated
from engine.trainer.checkpoint_writer import CheckpointWriter
from engine.trainer.checkpoints import CHECKPOINTS, PARTIAL, PREVIOUS, step_name
from engine.trainer.console import Console
from engine.trainer.failed_videos import FailedVideos
from engine.trainer.host_copies import KeptCopies
from engine.trainer.interruption import Agreement
from engine.trainer.logbook import Logbook, memory_megabytes
from engine.trainer.networks import SAMPLES, STATISTICS, StageBuilder
from engine.trainer.previous import (
    PreviousStages,
    check_same_classes,
    copy_previous,
    freeze_previous,
    load_previous,
)
from engine.trainer.ranks import Ranks, check_shared
from engine.trainer.reals import ClipWaits, Reals
from engine.trainer.retention import is_best
from engine.trainer.run_state import least_bytes, load_run, run_contents, run_facts
from engine.trainer.snapshots import Snapshots, measure_real_windows
from engine.trainer.stage_plan import RunPlan, needs_previous
from engine.trainer.step import StepStoppedError, Trainer
from engine.video.dataset import describe, untrained_classes
from engine.video.index import VideoIndex

if TYPE_CHECKING:
    from engine.trainer.profiling.step_profile import StepProfile


class Ended(NamedTuple):
    """How a run came to its end."""

    checkpoint: Path
    """The last one."""
    signal: int = 0
    """What stopped it before its last step, the same on every rank; 0 when nothing did."""


class StageEvaluation(Protocol):
    """The comparison of a stage's generator with real clips, prepared before training."""

    def line(self) -> str:
        """What is compared, for the user."""
        ...

    def measure(self, trainer: Trainer, goes_on: Callable[[], bool]) -> Evaluated | None:
        """Compare it as it is now. Collective.

        None on all ranks but 0, and where `goes_on`, asked between clips, says no.
        """
        ...


MakeEvaluation = Callable[[StageBuilder, VideoIndex, Path], StageEvaluation]


def run_stage(
    plan: RunPlan,
    index: VideoIndex,
    ranks: Ranks,
    console: Console,
    make_evaluation: MakeEvaluation | None = None,
) -> Ended:
    """Train to the last step or to a signal. Ranks must be connected.

    `make_evaluation` is needed where the stage's `evaluate_every` asks for it.
    """
    check_shared(plan.options.folder, ranks)
    _check_same_micro_batch(plan, ranks)
    stage = plan.config.stages[plan.options.stage_number]
    choose_convolutions(benchmark=stage.training.cudnn_benchmark)
    facts = describe(index, plan.config.data, stage.num_source_frames)
    for checkpoint in (*plan.resume_from[:1], plan.previous):
        if checkpoint is not None:
            check_same_classes(facts.classes, str(plan.config.data.path), checkpoint)
    if note := untrained_classes(facts, plan.config.data):
        console.say(f"note: {note}")
    builder = StageBuilder(plan.config, plan.options.stage_number, ranks, facts)
    loader = builder.loader(index)
    console.say(f"data: {loader.description}")
    try:
        builder = replace(builder, previous=_previous_stages(plan, builder, console))
        snapshots = _snapshots(plan, builder, index)
        trainer = builder.trainer(loader)
        for note in accelerate(stage, ranks, trainer, builder.previous):
            console.say(f"note: {note}")
        evaluation = None
        if stage.training.evaluate_every is not None:
            assert make_evaluation is not None
            evaluation = make_evaluation(builder, index, plan.options.folder)
            console.say(evaluation.line())
        failed = FailedVideos(loader, ranks, console, plan.config.data.max_failed)
        run = _Run(plan, builder, trainer, snapshots, evaluation, failed, console)
        run.resume()
        return run.train()
    finally:
        loader.close()


def _check_same_micro_batch(plan: RunPlan, ranks: Ranks) -> None:
    """UserError where "auto" came to another number elsewhere: ranks would wait for each other."""
    number = plan.options.stage_number
    own = plan.config.stages[number].training.samples_per_pass
    least, most = -ranks.largest(-own), ranks.largest(own)
    if least != most:
        raise UserError(
            f"micro_batch: auto came to {least} and to {most} on different ranks; use "
            f"--set stages.{number}.training.micro_batch={least}"
        )


def _previous_stages(
    plan: RunPlan, builder: StageBuilder, console: Console
) -> PreviousStages | None:
    """The frozen earlier stages, where this one needs them. Collective."""
    if not needs_previous(plan.config, builder.number):
        return None
    path = plan.options.folder / PREVIOUS
    if builder.ranks.is_main:
        _put_previous(path, plan, builder, console)
    builder.ranks.barrier()
    return load_previous(path, plan.config, builder.ranks.device)


def _put_previous(path: Path, plan: RunPlan, builder: StageBuilder, console: Console) -> None:
    """Copy or make previous.pt where it is not there; what is resumed was trained with it."""
    made = path
    training = plan.config.stages[builder.number].training
    if plan.previous_file is not None:
        plan.resume_from[0].verify_previous(plan.previous_file)
        made = path.with_name(PREVIOUS + PARTIAL)
        copy_previous(plan.previous_file, made)
    if plan.previous is not None:
        console.say(
            f"previous: {plan.previous.path}, frozen; {training.norm_statistics_passes} passes "
            "fix its norm statistics"
        )
        made = path.with_name(PREVIOUS + PARTIAL)
        freeze_previous(
            made,
            plan.config,
            plan.previous,
            builder.latents(builder.seed(STATISTICS)),
            batch_size=training.samples_per_pass,
            num_passes=training.norm_statistics_passes,
        )
    if plan.resume_from:
        plan.resume_from[0].verify_previous(made)
    if made != path:
        with writing(path):
            put_in_place(made, path)


def _snapshots(plan: RunPlan, builder: StageBuilder, index: VideoIndex) -> Snapshots:
    stage = plan.config.stages[builder.number]
    latents = builder.latents(builder.seed(SAMPLES))
    reals = None
    if stage.training.condition_on == "data" and builder.number > 1:
        # A loader of its own: the training one's position must not depend on samples.
        with contextlib.closing(builder.loader(index)) as loader:
            reals = Reals(loader, plan.config, builder.number)
            fakes = builder.fakes(latents, reals)
            inputs = fakes.draw(stage.training.samples_per_pass)
    else:
        fakes = builder.fakes(latents, None)
        inputs = fakes.draw(stage.training.samples_per_pass)
    return Snapshots(
        fakes,
        inputs,
        folder=plan.options.folder / "samples",
        frames_per_second=builder.frames_per_second,
        figures=lambda: measure_real_windows(builder, index),
    )


class _Run:
    """The loop: train, log, sample, save. Every cadence is stated where it is used."""

    def __init__(
        self,
        plan: RunPlan,
        builder: StageBuilder,
        trainer: Trainer,
        snapshots: Snapshots,
        evaluation: StageEvaluation | None,
        failed: FailedVideos,
        console: Console,
    ) -> None:
        self._config, self._options = plan.config, plan.options
        self._resume_from, self._unreadable = plan.resume_from, plan.unreadable
        self._builder, self._trainer, self._console = builder, trainer, console
        self._snapshots, self._evaluation, self._failed = snapshots, evaluation, failed
        self._ranks = builder.ranks
        self._stage = plan.config.stages[builder.number]
        self._training = self._stage.training
        self._folder = plan.options.folder
        self._checkpoints = self._folder / CHECKPOINTS
        self._writer = CheckpointWriter(
            self._checkpoints, self._ranks, keep=self._training.keep_checkpoints
        )
        self._copies = KeptCopies() if self._training.asynchronous_checkpoints else None
        self._agreement = Agreement(self._ranks, self._training.checkpoint_minutes)
        self._resumed: Path | None = None
        # What this process has loaded from its folder or written there, and how far that is.
        self._on_disk: tuple[Path, tuple[int, int]] | None = None

    def resume(self) -> None:
        """Load the newest undamaged checkpoint, if there is one to resume from."""
        chosen = self._ranks.broadcast(self._newest_whole() if self._ranks.is_main else 0)
        if chosen < len(self._resume_from):
            checkpoint = self._resume_from[chosen]
            load_run(self._trainer, self._builder, checkpoint)
            self._resumed = checkpoint.path
            if checkpoint.path.parent.resolve() == self._checkpoints.resolve():
                self._on_disk = checkpoint.path, self._trainer.progress
            self._console.say(f"resumed: {checkpoint.path}, step {checkpoint.step}")

    def train(self) -> Ended:
        """All steps that are still to do."""
        try:
            return self._train()
        except BaseException:
            self._writer.rescue()
            raise

    def _train(self) -> Ended:
        trainer, training = self._trainer, self._training
        last_step = self._options.max_steps or training.iterations
        checkpoint = self._checkpoints / step_name(trainer.step)
        if trainer.step >= last_step:
            self._console.say(f"nothing to do: step {trainer.step} of {last_step} is reached")
            return Ended(self._resumed or checkpoint)  # it may stand elsewhere
        profile = self._profile(last_step - trainer.step)
        if not self._fill_bank():
            return self._interrupted(self._saved())
        logbook = None
        if self._ranks.is_main:
            device = self._ranks.device
            logbook = Logbook(self._folder, resumed_at=trainer.step, device=device)
            if logbook.aside is not None:
                self._console.say(f"note: the log of an earlier run is now {logbook.aside}")
        progress = self._console.progress(trainer.step, last_step, f"stage {self._builder.number}")
        if trainer.step == 0:
            fake = self._snapshots.generate(trainer)
            if logbook:
                self._snapshots.write(0, fake, logbook)
        # Seconds are averaged over the steps since the last logged one.
        began, began_step, began_waits = time.monotonic(), trainer.step, trainer.seconds_waited
        waits = ClipWaits(self._config.data.num_threads)
        while trainer.step < last_step:
            step_began, had_waited = time.monotonic(), trainer.seconds_waited
            try:
                measures = (profile or trainer).train_step(self._agreement.goes_on)
            except StepStoppedError:
                checkpoint = self._saved()
                break
            step, seconds = trainer.step, time.monotonic() - step_began
            self._writer.poll()
            waits.add(trainer.seconds_waited - had_waited, seconds)
            self._agreement.step_took(seconds, trainer.num_micro_batches)
            progress.update(step, measures, note=waits.shown)
            if remedy := waits.remedy():
                self._console.say(remedy)
            self._failed.after_step(step, logbook)
            stopping = step == last_step or self._agreement.told_to_stop()
            stopping = stopping or bool(self._failed.reason)
            sampled = step % training.sample_every == 0
            now = time.monotonic()
            samples = self._snapshots.generate(trainer) if sampled or stopping else None
            improves, evaluated = False, None
            if self._evaluation_is_due(step, last_step, stopping=stopping):
                improves, evaluated = self._evaluate()
                stopping = stopping or self._agreement.told_to_stop()
            logged = step % training.log_every == 0 or step == 1 or sampled or stopping
            if logbook and (logged or evaluated):
                values = measures | self._speed((now - began) / (step - began_step))
                values["waiting_for_clips"] = (trainer.seconds_waited - began_waits) / (now - began)
                values["replaced_clips"] = self._failed.take_num_replaced()
                # At their own steps only, also where the run stops between them.
                if samples is not None and sampled:
                    values |= self._snapshots.figures(samples)
                values |= evaluated.to_log() if evaluated else {}
                logbook.scalars(step, values)
                began, began_step, began_waits = now, step, trainer.seconds_waited
            if logbook and samples is not None:
                self._snapshots.write(step, samples, logbook)
            save_is_due = step % training.checkpoint_every == 0 or self._agreement.save_is_due
            if save_is_due or improves or stopping:
                in_background = training.asynchronous_checkpoints and not stopping
                checkpoint = self._save(evaluated, wait=not in_background)
            if stopping:
                break
        progress.close()
        if profile:
            profile.close()
        if logbook:
            logbook.close()
        if self._failed.reason and trainer.step < last_step:
            raise self._failed.error(checkpoint)
        return self._interrupted(checkpoint) if trainer.step < last_step else Ended(checkpoint)

    def _saved(self) -> Path:
        """A checkpoint of where the run is: its own that is there already, or a new one."""
        if self._on_disk is not None and self._on_disk[1] == self._trainer.progress:
            self._writer.wait()
            return self._on_disk[0]
        return self._save()

    def _evaluation_is_due(self, step: int, last_step: int, *, stopping: bool) -> bool:
        """Every `evaluate_every` steps and after the last one; a signal does not wait for it."""
        every = self._training.evaluate_every
        if every is None or (stopping and step != last_step):
            return False
        return step % every == 0 or step == last_step

    def _evaluate(self) -> tuple[bool, Evaluated | None]:
        """Whether this step was found to be the best so far, and on rank 0 what was found."""
        assert self._evaluation is not None
        self._writer.wait()  # it may be the best one so far
        evaluated = self._evaluation.measure(self._trainer, self._agreement.goes_on)
        improves = evaluated is not None and is_best(evaluated, self._checkpoints)
        if evaluated is not None:
            self._console.say(evaluated.line(self._trainer.step, is_best=improves))
        return bool(self._ranks.broadcast(int(improves))), evaluated

    def _save(self, evaluated: Evaluated | None = None, *, wait: bool = True) -> Path:
        """Write a checkpoint, or only begin to; the path that it has or will have. Collective."""
        self._writer.wait()  # it reads the copies that are made next
        facts, step = run_facts(self._builder, evaluated), self._trainer.step
        contents = run_contents(self._trainer, self._builder, self._copies)
        needed = least_bytes(self._trainer)
        self._writer.start(step, facts, contents, least_bytes=needed)
        checkpoint = self._checkpoints / step_name(step)
        if wait:
            self._writer.wait()
        self._agreement.saved()
        self._on_disk = checkpoint, self._trainer.progress
        return checkpoint

    def _interrupted(self, checkpoint: Path) -> Ended:
        # Another --resume would be refused, now that this folder holds the newer checkpoint.
        changed = "" if self._options.resume == "auto" else " with --resume auto"
        self._console.say(f"interrupted: saved {checkpoint}; the same command{changed} goes on")
        return Ended(checkpoint, self._agreement.signal)

    def _fill_bank(self) -> bool:
        """Draw all that the bank holds at this step, so that the first step does not take longer.

        False when a signal asked for the end meanwhile: it may take hours.
        """
        bank = self._trainer.bank
        if bank is None:
            return True
        self._console.say(
            f"bank: drawing {bank.num_videos} videos on each rank, {bank.num_bytes / 1e6:.0f} MB "
            "of main memory"
        )
        began = time.monotonic()
        progress = self._console.progress(0, bank.num_batches, "bank", "batch")

        def goes_on(num_drawn: int) -> bool:
            progress.update(num_drawn)
            return not self._agreement.told_to_stop()

        filled = bank.advance(self._trainer.step, goes_on)
        progress.close()
        if filled:
            self._console.say(f"bank: drawn in {time.monotonic() - began:.1f} s")
        return filled

    def _profile(self, num_steps_left: int) -> "StepProfile | None":
        """The profile through which rank 0 takes its first steps, where one is asked for."""
        num_steps = self._options.profile_steps
        if num_steps is None:
            return None
        from engine.trainer.profiling.step_profile import NUM_STEPS_BEFORE, StepProfile

        needed = NUM_STEPS_BEFORE + num_steps
        if num_steps_left < needed:
            raise UserError(
                f"--profile {num_steps} takes {needed} steps, {num_steps_left} are left; "
                "raise --max-steps"
            )
        if not self._ranks.is_main:
            return None
        profile = StepProfile(
            self._trainer,
            self._folder,
            num_steps=num_steps,
            title=f"{self._config.name}, stage {self._builder.number}, one step of rank 0",
            dtype=compute_dtype(self._stage),
        )
        self._console.say(f"profile: {profile.folder}, after {needed} steps")
        return profile

    def _newest_whole(self) -> int:
        """Position in `resume_from` of the first checkpoint that verifies; its length if none."""
        for problem in self._unreadable:
            self._console.say(f"{problem}; trying an older one")
        for position, checkpoint in enumerate(self._resume_from):
            try:
                checkpoint.verify()
                return position
            except UserError as error:
                if self._options.resume != "auto":
                    raise
                self._console.say(f"{error}; trying an older one")
        if self._resume_from:
            raise UserError(f"no undamaged checkpoint in {self._checkpoints}")
        return 0

    def _speed(self, seconds_per_step: float) -> dict[str, float]:
        # Real clips that go through D.
        clips = self._training.global_batch * self._training.discriminator_steps
        return {
            "seconds_per_step": seconds_per_step,
            "clips_per_second": clips / seconds_per_step,
            "memory_MB": memory_megabytes(self._ranks.device),
        }
