"""The shared part of the scripts' command lines: one clear line and exit code 2 for bad input."""

import argparse
import errno
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from engine.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with errors of one line and no guessing at abbreviated options."""

    def __init__(self, description: str, epilog: str | None = None) -> None:
        super().__init__(
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def add_configuration(self) -> None:
        """`--config FILE` and `--set KEY=VALUE`; see `find_config`."""
        self.add_argument(
            "--config",
            default="configs/sample.yaml",
            metavar="FILE",
            help="what to train (default: %(default)s)",
        )
        self.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            dest="overrides",
            help="override a configuration key, e.g. stages.2.training.micro_batch=8; repeatable",
        )

    def add_generation(self) -> None:
        """A checkpoint, and how clips are made from it; see `check_generation`."""
        self.add_argument(
            "--checkpoint",
            type=Path,
            required=True,
            metavar="DIR",
            help="folder of a run or stage (its newest checkpoint), of a checkpoint, or one that "
            "engine/export.py wrote",
        )
        self.add_argument(
            "--sigma", type=float, default=1.0, help="standard deviation of z; 0.5 for pictures"
        )
        self.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
        self.add_argument(
            "--passes",
            type=int,
            metavar="N",
            help="dummy passes that fix the norm statistics (default: the configuration's)",
        )
        self.add_argument(
            "--batch", type=int, metavar="N", help="clips per dummy pass (default: 8)"
        )
        self.add_argument(
            "--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)"
        )

    def check_generation(self, options: argparse.Namespace, **least: int) -> None:
        """UserError for values that `add_generation` takes and nothing can be made with.

        `least` has the smallest values of other options, which may be None.
        """
        for name, lowest in {**least, "passes": 1, "batch": 1}.items():
            value = getattr(options, name)
            if value is not None and value < lowest:
                self.error(f"--{name.replace('_', '-')} must be at least {lowest}")
        if not 0 < options.sigma < math.inf:
            self.error("--sigma must be positive and finite")
        if not 0 <= options.seed < 2**63:
            self.error("--seed must be 0 to 2^63 - 1")
        if options.device == "cuda":
            import torch  # late: it is slow, and mistakes should be told at once

            if not torch.cuda.is_available():
                self.error("--device cuda: no GPU was found")

    def error(self, message: str) -> NoReturn:
        """Raise UserError: one line, where argparse would print the whole usage before it."""
        raise UserError(f"{message} (see {self.prog} --help)")


def find_config(name: str) -> Path:
    """The file as named or, for the shipped ones, in the repository: the script runs anywhere."""
    here, shipped = Path(name), REPOSITORY / name
    return here if here.exists() or not shipped.exists() else shipped


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Call `main` with the command line's arguments and exit with what it returns (None is 0), or
    2 on a UserError.

    Any other exception is a defect of ours and keeps its traceback.
    """
    try:
        exit_code = main(sys.argv[1:])
    except UserError as error:
        report(error)
        sys.exit(2)
    except OSError as error:
        # Wherever a path is first looked at, before it is known whether anything is there.
        if error.errno != errno.ENAMETOOLONG:
            raise
        report(UserError(f"{str(error.filename)[:80]}...: {error.strerror}"))
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # 128 + SIGINT, as shells report it
    sys.exit(exit_code)


def report(error: UserError) -> None:
    """Print the one line. A message may quote a library's, which may have several."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
