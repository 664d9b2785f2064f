"""The whole method in minutes: make sample videos, train three stages, generate, show what came.

`make demo` runs it. Every step is a command that a user can type, and is printed as such.
"""

import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

from engine.command_line import REPOSITORY, ArgumentParser, run
from engine.durable_files import remove_folder
from engine.errors import UserError

OUT, QUICK_OUT, LONG_OUT = Path("runs/demo"), Path("runs/demo-quick"), Path("runs/demo-long")
NUM_STAGES = 3
NUM_CLIPS = 16


def main(arguments: list[str]) -> None:
    """Train, sample, measure, draw the curves."""
    parser = ArgumentParser(__doc__ or "")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"(default: {OUT})")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--quick",
        action="store_true",
        help=f"a few steps only: a check, no result (default of --out: {QUICK_OUT}, emptied first)",
    )
    length.add_argument(
        "--long",
        action="store_true",
        help=f"several times as long, for better videos (default of --out: {LONG_OUT})",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    if not 0 <= options.seed < 2**63:
        parser.error("--seed must be 0 to 2^63 - 1")
    default = QUICK_OUT if options.quick else LONG_OUT if options.long else OUT
    if options.seed:
        default = default.with_name(f"{default.name}-seed-{options.seed}")
    out = options.out or default
    if options.quick and not options.out:  # a folder of our own
        remove_folder(out)  # the run that is there would be resumed, and nothing be checked
    began = time.monotonic()
    # Said aloud, so that DeepSpeed does not warn that it had to find out.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    extra = [f"training.seed={options.seed}"] if options.seed else []
    extra += ["variant=long"] if options.long else []
    extra += ["training.norm_statistics_passes=2"] if options.quick else []
    settings = [word for setting in extra for word in ("--set", setting)]
    settings += ["--max-steps", "6"] if options.quick else []
    for number in range(1, NUM_STAGES + 1):
        _train(number, out, settings)
    samples, figures, picture = out / "samples", out / "figures.json", out / "beside-real.webp"
    _call(
        _here("engine/sample.py"),
        *("--checkpoint", str(out), "--out", str(samples), "--num", str(NUM_CLIPS)),
        *(("--passes", "2") if options.quick else ()),
    )
    _call(
        _here("engine/measure.py"),
        *("--checkpoint", str(out), "--out", str(figures), "--picture", str(picture)),
        *(("--num", "2", "--passes", "2") if options.quick else ()),
    )
    from engine.charts import training_curves  # imported late: matplotlib is slow

    curves = out / "loss-curves.png"
    stages = range(1, NUM_STAGES + 1)
    training_curves({f"stage {n}": out / f"stage{n}" / "log.jsonl" for n in stages}, curves)
    print(
        f"\nThe demo took {time.monotonic() - began:.0f} s. Look at:\n"
        f"  {samples / 'grid.mp4'}  (and clip-*.mp4 beside it)\n"
        f"  {samples / 'contact-sheet.png'}\n"
        f"  {picture}  (real clips above generated ones)\n"
        f"  {curves}\n"
        f"  {figures}  (the table above, and more)\n"
        f"  tensorboard --logdir {out}"
    )


def _here(file: str) -> str:
    """A file of the repository, as it is called from the working directory, whichever that is."""
    return os.path.relpath(REPOSITORY / file)


def _train(number: int, out: Path, settings: list[str]) -> None:
    script = _here("engine/train.py")
    # Spelt as a module because a launcher script's first line breaks in paths with spaces. One
    # process: the networks are too small to be worth sharing among GPUs.
    _call(
        "-m",
        *("deepspeed.launcher.runner", "--num_gpus", "1", "--log_level", "error"),
        *("--master_port", str(_free_port())),  # two demos may run at a time
        script,
        *("--config", _here("configs/sample.yaml"), "--stage", str(number)),
        *("--out", str(out), *settings),
        shown=shlex.join(
            ["deepspeed", script, "--stage", str(number), "--out", str(out), *settings]
        ),
    )


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


def _call(*arguments: str, shown: str | None = None) -> None:
    shown = shown or shlex.join(["python", *arguments])
    print(f"\n$ {shown}", flush=True)
    environment = os.environ | {
        # Threads that spin long while they wait cost a busy two-core machine a factor of five;
        # ones that never spin, a factor of 1.4 on an idle one.
        "GOMP_SPINCOUNT": "10000",
    }
    code = subprocess.run([sys.executable, *arguments], env=environment, check=False).returncode
    if code:
        raise UserError(f"this command failed with exit code {code}: {shown}")


if __name__ == "__main__":
    run(main)
