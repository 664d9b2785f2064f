"""The log of a stage as a file: where it ends, cutting it back, and putting it aside."""

import json
from pathlib import Path

from engine.durable_files import reading, writing

LOG = "log.jsonl"


def last_logged_step(folder: Path) -> int:
    """The last step in a stage's log; 0 where nothing is logged."""
    path = folder / LOG
    if not path.exists():
        return 0
    with reading(path):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    steps = [step for line in lines if (step := _step(line)) is not None]
    return steps[-1] if steps else 0


def cut_back(path: Path, last_step: int) -> None:
    """Take out the lines after a step, and one that a crash cut short."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line for line in lines if (step := _step(line)) is not None and step <= last_step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    partial.replace(path)


def put_aside(path: Path) -> Path | None:
    """Give the log another name, where anything is in it; returns that."""
    if not path.exists() or not path.stat().st_size:
        return None
    number = 1
    while (aside := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    with writing(aside):
        path.rename(aside)
    return aside


def _step(line: str) -> int | None:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None
