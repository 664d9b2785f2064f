"""One result file of several calls on the same device, versions and commit.

Files of benchmarks/first_hour are taken too, as far as they hold results.
"""

import json
import sys
from functools import reduce
from pathlib import Path

if __name__ == "__main__":  # run as a file, its folder is on the path and the repository is not
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import results
from benchmarks.first_hour.as_results import document_of
from benchmarks.first_hour.parts import CallFile
from benchmarks.results import Document
from engine.command_line import ArgumentParser, run
from engine.errors import UserError

EPILOG = """\
example:
  python benchmarks/merge.py FIRST.json SECOND.json       into benchmarks/results/
"""


def main(arguments: list[str]) -> None:
    """Read all, add one to the other, write a new file named by the first one's date."""
    parser = ArgumentParser(__doc__ or "", EPILOG)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="in the calls' order")
    parser.add_argument(
        "--results", type=Path, default=results.FOLDER, metavar="DIR", help="where it goes"
    )
    options = parser.parse_args(arguments)
    merged = reduce(_added, map(read, options.files))
    print(results.write(merged, options.results))


def read(path: Path) -> Document:
    """A result file, or a call's as one. Raises UserError with one line."""
    try:
        tree = json.loads(path.read_text())
        if "call" in tree:
            return document_of(CallFile.model_validate(tree))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}") from None
    return results.read(path)


def _added(before: Document, more: Document) -> Document:
    """A step that was measured is no longer one that was skipped; rows tell by themselves."""
    return results.added(before, more, passed=[step.case for step in more.steps])


if __name__ == "__main__":
    run(main)
