"""Draw what training runs logged: metrics, losses and figures, several runs in one picture."""

import argparse
from pathlib import Path

from engine.command_line import ArgumentParser, run
from engine.errors import UserError

EPILOG = """\
examples:
  python engine/curves.py runs/ucf101                          all of its stages
  python engine/curves.py runs/conv3d/stage2 runs/conv_gru/stage2 --out appendix-c.png

A panel for each metric that was evaluated in training (training.evaluate_every) has a line for each
stage; below, a row for each stage has its losses.
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line's options."""
    parser = ArgumentParser(__doc__ or "", EPILOG)
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run or of one of its stages")
    add("--out", type=Path, default=Path("curves.png"), metavar="FILE.png")
    options = parser.parse_args(arguments)
    if options.out.suffix != ".png":
        parser.error(f"--out {options.out}: the name must end in .png")
    return options


def find_logs(folder: Path) -> dict[str, Path]:
    """Logs by the names of their folders. Raises UserError where there are none."""
    stages = [folder, *sorted(folder.glob("stage*"))]
    logs = {str(stage): stage / "log.jsonl" for stage in stages if (stage / "log.jsonl").is_file()}
    if not logs:
        raise UserError(f"no log.jsonl in {folder} or in a stage's folder below it")
    return logs


def main(arguments: list[str]) -> None:
    """Find the logs and draw them."""
    options = parse(arguments)
    logs = {name: log for folder in options.runs for name, log in find_logs(folder).items()}
    from engine.charts import training_curves  # imported late: matplotlib is slow

    training_curves(logs, options.out)
    print(f"wrote: {options.out}")


if __name__ == "__main__":
    run(main)
