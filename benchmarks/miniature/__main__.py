"""Train the paper's comparisons in miniature, measure them, and say which conclusions hold."""

import argparse
import os
import shutil
import signal
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NoReturn

from benchmarks.miniature.budget import MINUTES, OVERHEAD_MINUTES
from benchmarks.miniature.jobs import Processes, jobs_of
from benchmarks.miniature.measured import OF_REAL_CLIPS, ClipFigures, read_measured
from benchmarks.miniature.models import MODELS
from benchmarks.miniature.plan import MiniaturePlan, Settings, settle
from benchmarks.miniature.verdicts import CONCLUSIONS, Real, Results, judge
from engine.command_line import ArgumentParser, run
from engine.durable_files import make_writable_folder, remove_folder, write_json, writing
from engine.video.dataset import held_out, open_dataset

OUT, QUICK_OUT = Path("runs/miniature"), Path("runs/miniature-quick")
TABLE, FIGURES, PICTURE = "table.md", "figures.json", "picture.png"
SECONDS_BETWEEN_LINES = 60
MOST_MINUTES = 10_000
EPILOG = """\
examples:
  make miniature
  python -m benchmarks.miniature --seeds 3 --commit-to benchmarks/results/miniature
  python -m benchmarks.miniature --quick     checks the code; its figures mean nothing

Writes OUT/table.md, figures.json and picture.png. Ctrl-C stops it; the same command goes on. With
more --seeds later, only those that are new are trained.
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line's options."""
    parser = ArgumentParser(__doc__ or "", EPILOG)
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", help=f"(default: {OUT}; with --quick {QUICK_OUT})")
    add("--seeds", type=int, default=2, metavar="N", help="of training (default: %(default)s)")
    add(
        "--minutes",
        type=float,
        default=MINUTES,
        help="per seed on a core of its own: what the budget of FLOPs is for, not a limit "
        "(default: %(default)g)",
    )
    add("--quick", action="store_true", help="a few iterations and clips: a check, no result")
    add("--commit-to", type=Path, metavar="DIR", help="copy table, figures and picture there too")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error("--seeds must be at least 1")
    if not OVERHEAD_MINUTES < options.minutes <= MOST_MINUTES:
        parser.error(
            f"--minutes must be more than {OVERHEAD_MINUTES:g}, which nothing trains in, and at "
            f"most {MOST_MINUTES}"
        )
    return options


def main(arguments: list[str]) -> None:
    """Settle, train, measure, judge, write."""
    # Said aloud, so that DeepSpeed does not warn that it had to find out.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Imported late: they bring DeepSpeed and matplotlib.
    from benchmarks.miniature.evaluating import evaluate_models, with_evaluations
    from benchmarks.miniature.picture import draw
    from benchmarks.miniature.report import cost_lines, report, tree

    options = parse(arguments)
    out = options.out or (QUICK_OUT if options.quick else OUT)
    if options.quick and not options.out:  # a folder of our own
        remove_folder(out)  # what is done there would not be done again, and nothing be checked
    for folder in (out, options.commit_to):
        if folder is not None:
            make_writable_folder(folder)
    clock = Clock()
    plan = settle(out, Settings.of(options.minutes, options.quick), say=clock.say)
    print("\n".join(cost_lines(plan)), flush=True)
    seeds = list(range(options.seeds))
    make_data(plan)
    carry_out(plan, seeds, clock)
    evaluate_models(plan, seeds, clock.say)
    results, reals = read_results(plan, seeds)
    ranked = with_evaluations(plan, results)
    judgements = [judge(conclusion, results, reals) for conclusion in CONCLUSIONS]
    table = report(plan, results, reals, judgements, ranked)
    with writing(out / TABLE):
        (out / TABLE).write_text(table)
    write_json(out / FIGURES, tree(plan, results, reals, judgements, ranked))
    draw(out / PICTURE, out, results, reals)
    print(f"\n{table}")
    folder = out
    if options.commit_to is not None:
        folder = options.commit_to
        with writing(folder):
            for name in (TABLE, FIGURES, PICTURE):
                shutil.copyfile(out / name, folder / name)
    clock.say(f"wrote {TABLE}, {FIGURES} and {PICTURE} to {folder}")


class Clock:
    """Prints lines with the time that has passed."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def say(self, line: str) -> None:
        """Print it now."""
        minutes, seconds = divmod(round(time.monotonic() - self._began), 60)
        print(f"[{minutes:3}:{seconds:02}] {line}", flush=True)


def make_data(plan: MiniaturePlan) -> None:
    """Make the sample set and its held-out clips, which seeds would make at the same time."""
    data = plan.data_config.data
    for made in (data, held_out(data)):
        if made is not None:
            open_dataset(made, make=True, say=print)


def carry_out(plan: MiniaturePlan, seeds: list[int], clock: Clock) -> None:
    """All jobs of all seeds, as many seeds at a time as there are cores.

    Raises UserError when one fails. Then, and when it is interrupted, it stops all of them first.
    """
    processes = Processes()

    def work(seed: int) -> None:
        jobs = jobs_of(plan, seed)
        for number, job in enumerate(jobs, start=1):
            clock.say(f"seed {seed}: {number} of {len(jobs)}: {job.title}")
            processes.run(seed, job)
        clock.say(f"seed {seed}: done")

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        with ThreadPoolExecutor(min(len(seeds), os.cpu_count() or 1)) as pool:
            pending = {pool.submit(work, seed) for seed in seeds}
            try:
                while pending:
                    done, pending = wait(pending, SECONDS_BETWEEN_LINES, FIRST_EXCEPTION)
                    for future in done:
                        future.result()
                    if not done:
                        running = "; ".join(f"seed {s}: {at}" for s, at in processes.progress())
                        clock.say(running)
            except BaseException:
                clock.say("stopping")
                processes.stop()
                raise
    finally:
        signal.signal(signal.SIGTERM, before)


def read_results(plan: MiniaturePlan, seeds: list[int]) -> tuple[Results, dict[int, Real]]:
    """What was measured, by seed."""

    def read(seed: int, name: str) -> ClipFigures:
        measured = read_measured(plan.out, seed, name)
        assert measured is not None, (seed, name)
        return measured

    results = {seed: {model.name: read(seed, model.name) for model in MODELS} for seed in seeds}
    reals = {seed: Real(*(read(seed, name) for name in OF_REAL_CLIPS)) for seed in seeds}
    return results, reals


if __name__ == "__main__":
    run(main)
