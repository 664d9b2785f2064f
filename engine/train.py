"""Train one stage of SSW-GAN (or the DVD-GAN baseline) on video files."""

import argparse
import contextlib
import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from engine.batches import accumulation_steps
from engine.command_line import ArgumentParser, find_config, report, run
from engine.configuration import Config, Training, load_config
from engine.durable_files import remove_partials
from engine.errors import UserError
from engine.trainer.checkpoints import CHECKPOINTS
from engine.trainer.console import Console
from engine.trainer.failing_ranks import give_up, wait_for_the_end
from engine.trainer.folder_lock import FolderLock
from engine.trainer.interruption import follow_launcher
from engine.trainer.ranks import Ranks
from engine.trainer.stage_plan import (
    RunOptions,
    RunPlan,
    checkpoints_in,
    plan_run,
    resume_candidates,
    settle_batches,
    with_micro_batch_of,
)

if TYPE_CHECKING:
    from engine.trainer.stage_run import MakeEvaluation

EPILOG = """\
examples:
  deepspeed engine/train.py --stage 1      the sample data set, on all GPUs, or on the CPU
  deepspeed engine/train.py --stage 2      goes on from stage 1 under the same --out
  deepspeed --num_gpus 8 engine/train.py --config configs/kinetics600.yaml --data INDEX --stage 1
  python engine/train.py --stage 1 --set training.micro_batch=4 --max-steps 100

Every stage writes to OUT/stageN: checkpoints, log.jsonl, TensorBoard files and samples. Ctrl-C
writes a checkpoint; the same command goes on from it.
"""
REHEARSED_DEVICE = "h100"  # engine/plan.py's default; for `micro_batch: auto`
MOST_REHEARSED = 65_536  # minutes: DeepSpeed lists every rank


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line's options."""
    parser = ArgumentParser(__doc__ or "", EPILOG)
    parser.add_argument(
        "--stage", type=int, required=True, metavar="N", help="which stage to train"
    )
    parser.add_configuration()
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="an index made by engine/prepare.py, or a folder of videos (default: data.path)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where to write (default: runs/NAME)"
    )
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|none|PATH",
        help="go on from the newest checkpoint under --out, from none, or from PATH",
    )
    parser.add_argument(
        "--previous",
        type=Path,
        metavar="PATH",
        help="run, stage or checkpoint folder of the stage before (default: under --out)",
    )
    parser.add_argument(
        "--condition-on",
        choices=("generated", "data"),
        help="what stages after the first upsample (default: training.condition_on)",
    )
    parser.add_argument(
        "--max-steps",
        type=int,
        metavar="N",
        help="stop when N generator updates are done in all, fewer or more than the default, "
        "training.iterations",
    )
    parser.add_argument(
        "--profile",
        type=int,
        nargs="?",
        const=2,
        metavar="STEPS",
        help="write a trace, memory and a table of every module's time, FLOPs, bytes and HFU of "
        "rank 0 to OUT/stageN/profile, from STEPS steps (%(const)s) soon after the start; then "
        "train on",
    )
    parser.add_argument(
        "--rehearse",
        type=int,
        metavar="N",
        help="play rank 0 of N GPUs at full size without a GPU, write nothing, and tell how data, "
        "batch, ZeRO and checkpoints are divided",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed passes it
    options = parser.parse_args(arguments)
    if options.data == "":  # a shell variable that is not set
        parser.error("--data names nothing; name an index or a folder of videos")
    if options.max_steps is not None and options.max_steps < 1:
        parser.error("--max-steps must be at least 1")
    if options.profile is not None and options.profile < 1:
        parser.error("--profile must time at least 1 step")
    if options.rehearse is not None and options.rehearse < 1:
        parser.error("--rehearse must be at least 1 GPU")
    return options


def configure(options: argparse.Namespace) -> Config:
    """The configuration file with the command line's changes."""
    overrides = list(options.overrides)
    if options.condition_on == "data":  # there is nothing to bank, unless it is asked for
        overrides.insert(0, f"stages.{options.stage}.training.sample_bank=null")
    if options.condition_on:
        overrides.append(f"stages.{options.stage}.training.condition_on={options.condition_on}")
    if options.data is not None:
        overrides += [f"data.path={json.dumps(options.data)}", "data.procedural=null"]
    return load_config(find_config(options.config), overrides)


def main(arguments: list[str]) -> int:
    """Parse, check, then build and run. Returns 0, or 128 + the signal that stopped the run."""
    ranks = Ranks.from_environment()
    follow_launcher()
    try:
        options = parse(arguments)
        if options.rehearse is not None:
            rehearse(options, ranks)
            return 0
        plan = settle(options, ranks)
        # Before anything is written there; the other ranks join when all are connected.
        lock = FolderLock(plan.options.folder, is_main=True) if ranks.is_main else None
        if ranks.is_main:  # before anything grows there: these may be what fills the disk
            remove_partials(plan.options.folder / CHECKPOINTS)
        console = Console(is_main=ranks.is_main)
        console.capture(plan.options.folder / "logs" / f"rank-{ranks.rank:05d}.log")
    except UserError:
        if not ranks.is_main:
            wait_for_the_end()  # rank 0 nearly always has the same to say
        raise
    announce(plan, ranks, console)
    return train(plan, ranks, console, lock)


def settle(options: argparse.Namespace, ranks: Ranks) -> RunPlan:
    """Everything that can be checked before data or other ranks are touched."""
    plan = settled_plan(options, ranks)
    number = plan.options.stage_number
    if plan.config.stages[number].training.evaluate_every is not None:
        from engine.evaluation.training_metrics import check_evaluation

        check_evaluation(plan.config, number)
    return plan


def settled_plan(options: argparse.Namespace, ranks: Ranks) -> RunPlan:
    """The plan, with a micro-batch of `auto` settled."""
    config = configure(options)
    run = run_options(options, config)
    if not asks_for_micro_batch(config, options.stage):
        return plan_run(config, run, ranks)
    resumed, _ = resume_candidates(run)
    # Where memory is another now, too: its batches are this run's.
    if resumed and resumed[0].world_size == ranks.world_size:
        config = with_micro_batch_of(resumed[0], config, options.stage)
        return plan_run(config, run, ranks)
    with chatter_apart(is_main=ranks.is_main):
        from engine.planning.micro_batch import device_memory_gb, settle_micro_batch

        memory_gb = device_memory_gb(ranks.device)
        config, note = settle_micro_batch(
            config, options.stage, num_ranks=ranks.world_size, memory_gb=memory_gb
        )
    plan = plan_run(config, run, ranks)
    plan.notes.insert(0, note)
    return plan


def asks_for_micro_batch(config: Config, stage_number: int) -> bool:
    """Whether `micro_batch` of a stage that there is must be settled."""
    stage = config.stages.get(stage_number)
    return stage is not None and stage.training.micro_batch == "auto"


@contextlib.contextmanager
def chatter_apart(*, is_main: bool) -> Iterator[Console]:
    """A console, while what libraries print goes to a file that nobody reads."""
    console = Console(is_main=is_main)
    with TemporaryDirectory() as folder:
        try:
            console.capture(Path(folder) / "chatter.log")
            yield console
        finally:
            console.release()


def run_options(options: argparse.Namespace, config: Config) -> RunOptions:
    """What the command line adds to the configuration."""
    out = options.out or Path("runs") / config.name
    return RunOptions(
        config_name=options.config,
        stage_number=options.stage,
        out=out,
        repeated=repeated_options(options, out),
        resume=options.resume,
        previous=options.previous,
        max_steps=options.max_steps,
        profile_steps=options.profile,
    )


def repeated_options(options: argparse.Namespace, out: Path) -> str:
    """What a command for another stage of the same run has to repeat, ready for a shell."""
    words = ["--config", options.config, "--out", str(out)]
    if options.data is not None:
        words += ["--data", options.data]
    for override in options.overrides:
        words += ["--set", override]
    return " " + shlex.join(words)


def rehearse(options: argparse.Namespace, ranks: Ranks) -> None:
    """Play rank 0 of `options.rehearse` and print what was found; nothing is written."""
    if ranks.world_size > 1:
        raise UserError(
            f"--rehearse {options.rehearse} plays all ranks in one process: start it with "
            "python engine/train.py, without a launcher"
        )
    with chatter_apart(is_main=True) as console:
        config = settle_for_rehearsal(options, say=console.say)
        if options.rehearse > MOST_REHEARSED:
            raise UserError(
                f"--rehearse {options.rehearse}: at most {MOST_REHEARSED} GPUs can be played"
            )
        for name in ("resume", "previous", "max_steps", "profile"):
            if getattr(options, name) not in (None, "auto"):
                option = "--" + name.replace("_", "-")
                console.say(
                    f"note: {option} is not used: a rehearsal is one step from no checkpoint"
                )
        from engine.rehearsal.rehearse import rehearse as rehearse_stage
        from engine.rehearsal.report import report_lines
        from engine.rehearsal.stand_ins import fake_job

        with fake_job(options.rehearse) as played:
            found = rehearse_stage(
                config,
                options.stage,
                played,
                data_asked=options.data is not None,
                say=console.say,
            )
        for line in report_lines(found):
            console.say(line)


def settle_for_rehearsal(options: argparse.Namespace, *, say: Callable[[str], None]) -> Config:
    """The configuration as so many ranks run it; no checkpoint is looked for."""
    config = configure(options)
    if asks_for_micro_batch(config, options.stage):
        from engine.planning.assumptions import DEVICES
        from engine.planning.micro_batch import settle_micro_batch

        device = DEVICES[REHEARSED_DEVICE]
        config, note = settle_micro_batch(
            config, options.stage, num_ranks=options.rehearse, memory_gb=device.memory_gb
        )
        say(f"note: {note} (of an {device.title})")
    return settle_batches(config, run_options(options, config), options.rehearse)


def announce(plan: RunPlan, ranks: Ranks, console: Console) -> None:
    """What runs and where it writes."""
    stage, options = plan.config.stages[plan.options.stage_number], plan.options
    training = stage.training
    made = f"{stage.resolution}x{stage.resolution}, {stage.num_frames} frames"
    console.say(
        f"stage {options.stage_number} of {plan.config.name}: {made}; {training.precision}, "
        f"ZeRO-{training.zero_stage}"
        + (", optimizer on the CPU" if training.offload_optimizer else "")
    )
    for line in batch_lines(training, ranks):
        console.say(line)
    console.say(f"writes: {options.folder}")
    for note in plan.notes:
        console.say(f"note: {note}")


def batch_lines(training: Training, ranks: Ranks) -> list[str]:
    """How the global batch comes about, and whose samples the norms' statistics are over."""
    world_size, micro_batch = ranks.world_size, training.samples_per_pass
    num_accumulated = accumulation_steps(training, world_size)
    devices = _counted(world_size, "GPU" if ranks.device.type == "cuda" else "CPU")
    samples = _counted(micro_batch, "sample")
    if training.synchronized_norms and world_size > 1:
        sharing = f"{micro_batch * world_size} samples, synchronized over {devices}"
    else:
        sharing = samples + (", not synchronized" if world_size > 1 else "")
    if num_accumulated > 1:
        sharing += "; accumulated micro-batches have their own"
    return [
        f"batch {training.global_batch} = {devices} x {samples} x {num_accumulated} accumulated",
        f"norm statistics: over {sharing}",
    ]


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("s" if count > 1 else "")


def train(plan: RunPlan, ranks: Ranks, console: Console, lock: FolderLock | None) -> int:
    """Connect the ranks and train; returns the exit code. Rank 0 has the folder's `lock`.

    Whatever libraries print goes to the rank's log file.
    """
    try:
        # Imported late: these pull in DeepSpeed and DALI, which talk while they are imported.
        from engine.trainer.stage_run import run_stage
        from engine.video.dataset import open_dataset

        if not ranks.is_main:
            ranks.connect()  # waits for rank 0, which may be making the data set
        index = open_dataset(plan.config.data, make=ranks.is_main, say=console.say)
        if ranks.is_main:
            ranks.connect()
        lock = share_lock(plan, lock, ranks)
        if not lock.works:
            console.say("note: this file system has no locks: start no other run in this folder")
        ended = run_stage(plan, index, ranks, console, evaluation_of(plan))
        if not ended.signal:
            console.say(f"done: {ended.checkpoint}")
            return 0
        # Together: when one rank has failed, launchers end those that still write.
        ranks.barrier()
        # As shells report it, and so that a script does not go on to the next stage.
        return 128 + ended.signal
    except Exception as error:
        give_up(error, ranks, tell=lambda error: tell_failure(error, console), note=console.log)
    finally:
        ranks.disconnect()
        console.release()
        if lock is not None:
            lock.release()


def evaluation_of(plan: RunPlan) -> "MakeEvaluation | None":
    """How the stage is evaluated while it trains; None where it is not."""
    if plan.config.stages[plan.options.stage_number].training.evaluate_every is None:
        return None
    from engine.evaluation.during_training import TrainingEvaluation

    return TrainingEvaluation


def share_lock(plan: RunPlan, lock: FolderLock | None, ranks: Ranks) -> FolderLock:
    """The folder's lock for every rank of this job. Collective.

    Raises UserError, on every rank, where another run has saved there since this one was planned:
    it was ending while this one started.
    """
    folder = plan.options.folder
    if lock is not None:
        lock.admit_others()
    ranks.barrier()
    lock = lock or FolderLock(folder, is_main=False)
    if ranks.any(checkpoints_in(folder) != plan.checkpoints_seen):
        raise UserError(
            f"{folder}: another run has saved checkpoints there while this one started; the same "
            "command goes on from them"
        )
    return lock


def tell_failure(error: Exception, console: Console) -> None:
    """One line for the user's mistakes, a traceback for ours."""
    if isinstance(error, UserError):
        console.release()
        report(error)
    else:
        console.crash(error)


if __name__ == "__main__":
    run(main)
