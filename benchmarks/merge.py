"""One result file of several calls on the same device, versions and commit.

Files of benchmarks/first_hour are taken too, as far as they hold results.
"""

import json
import sys
from collections import defaultdict
from functools import reduce
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a file, its folder is on the path and the repository is not
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import results
from benchmarks.first_hour.parts import CallFile
from benchmarks.results import Attempt, Document, Made, Rates
from benchmarks.setups import step_of
from engine.command_line import ArgumentParser, run
from engine.errors import UserError

EPILOG = """\
example:
  python benchmarks/merge.py FIRST.json SECOND.json       into benchmarks/results/
"""


def main(arguments: list[str]) -> None:
    """Read all, add one to the other, write a new file named by the first one's date."""
    parser = ArgumentParser(__doc__ or "", EPILOG)
    add, folder = parser.add_argument, results.FOLDER
    add("files", nargs="+", type=Path, metavar="FILE", help="in the calls' order")
    add("--results", type=Path, default=folder, metavar="DIR", help="where it goes")
    options = parser.parse_args(arguments)
    merged = reduce(results.added, map(read, options.files))
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


def document_of(file: CallFile) -> Document:
    """The iterations and rates of a call. Raises UserError for a file of few channels."""
    if file.small:
        raise UserError(f"the {file.call} call was of --small networks: that is no result")
    by_kind: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for part in file.parts:
        if part.status == "done" and isinstance(part.value, dict):
            fields = dict(part.value)
            by_kind[fields.pop("kind", "")].append(fields)
    attempts: defaultdict[tuple[str, str], list[Attempt]] = defaultdict(list)
    for fields in by_kind["iteration"]:
        key = fields.pop("setup"), fields.pop("build")
        attempts[key].append(Attempt.model_validate(fields))
    flops = {fields["setup"]: fields["tflop_per_sample"] for fields in by_kind["flops"]}
    rates = [Rates.model_validate(fields) for fields in by_kind["rates"]]
    rate = rates[-1].matmul_tflop_per_s if rates else None
    return Document.begun(
        {name: getattr(file, name) for name in Made.model_fields},
        quick=False,
        seconds=round(sum(part.seconds or 0 for part in file.parts), 1),
        rates=rates,
        steps=[
            step_of(setup, build, tried, flops[setup], rate)
            for (setup, build), tried in attempts.items()
            if setup in flops
        ],
        failed=[f"{file.call}: {p.name}" for p in file.parts if p.status in ("failed", "begun")],
    )


if __name__ == "__main__":
    run(main)
