"""Run a call's parts and record them: `python -m benchmarks.first_hour CALL --out DIR [NAME...]`.

The cheapest and most decisive calls first, as benchmarks/gpu_session.sh runs them. A call's file is
DIR/CALL.json, or DIR/CALL-NAME-NAME.json; parts.py says what it holds. Exit code 75 asks to be
started again with the same arguments: the GPU's context is lost, and parts are left.
"""

import argparse
import importlib
import os
import sys
from pathlib import Path

import kernels
from benchmarks.first_hour.parts import Recorder
from benchmarks.setups import SETUPS, scale_here

MODULES = {
    "versions": "versions",
    "limits": "operators",
    "correctness": "operators",
    "steps": "iterations",
    "profile": "iterations",
    "memory": "iterations",
}
"""By call, which is a function there that makes its parts.

Each is imported when it is asked for: where DeepSpeed is missing, versions say so.
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_hour")
    add = parser.add_argument
    add("call", choices=MODULES)
    add("setups", nargs="*", metavar="SETUP", help="of benchmarks/setups.py")
    add("--out", type=Path, required=True, metavar="DIR")
    add("--budget", type=float, metavar="SECONDS", help="start no part after these")
    add("--small", action="store_true", help="few channels and samples: does it run?")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.setups) - set(SETUPS)):
        parser.error(f"no setup is named {', '.join(unknown)}: there are {', '.join(SETUPS)}")
    return options


def main(arguments: list[str]) -> int:
    """The exit code: 0 when every part is recorded, however it ended."""
    options = parse(arguments)
    kernels.set_default("auto")  # what runs by itself, whatever KERNELS says
    scale = scale_here(small=options.small)
    call = "-".join([options.call, *options.setups])
    path = options.out / f"{call}.json"
    recorder = Recorder(path, call, small=options.small, budget=options.budget)
    module = importlib.import_module(f"benchmarks.first_hour.{MODULES[options.call]}")
    return recorder.run(getattr(module, options.call)(scale, tuple(options.setups)))


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # everything is written, and letting go of a GPU's libraries may take long
