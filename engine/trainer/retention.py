"""Which checkpoints of a stage are kept: the newest ones, and the best one that was evaluated.

A checkpoint of a step that was evaluated has the values in its meta.json. So its folder alone tells
which one is best, also after a restart. `checkpoints/best` is a link to it.
"""

import shutil
from pathlib import Path

from engine.durable_files import PARTIAL, writing
from engine.errors import UserError
from engine.trainer.checkpoint_meta import Evaluated
from engine.trainer.checkpoints import BEST, open_checkpoint, step_folders


def is_best(found: Evaluated, folder: Path) -> bool:
    """Whether no checkpoint in `folder` that compares is as good."""
    others = [each for each in _evaluations(folder).values() if each.compares_with(found)]
    return all(found.badness < other.badness for other in others)


def best_checkpoint(folder: Path) -> Path | None:
    """The best evaluated checkpoint in `folder`, the first of equals; None where none is evaluated.

    Of those that compare with the newest evaluated one: a resumed run may have changed what it
    measures.
    """
    evaluations = _evaluations(folder)
    if not evaluations:
        return None
    newest = list(evaluations.values())[-1]
    comparable = {path: each for path, each in evaluations.items() if each.compares_with(newest)}
    return min(comparable, key=lambda path: comparable[path].badness)


def keep_newest_and_best(written: Path, keep: int) -> None:
    """Remove all but `keep` checkpoints and the best one, to which `best` then leads.

    Those are the one just `written`, which may be of an earlier step than others in its folder, and
    the newest ones.

    Raises UserError when something cannot be removed or written.
    """
    folder = written.parent
    best = best_checkpoint(folder)
    with writing(folder):
        others = [path for path in step_folders(folder) if path != written]
        for old in others[::-1][keep - 1 :]:
            if old != best:
                shutil.rmtree(old)
        if best is not None:
            partial = folder / (BEST + PARTIAL)
            partial.unlink(missing_ok=True)
            partial.symlink_to(best.name)
            partial.replace(folder / BEST)


def _evaluations(folder: Path) -> dict[Path, Evaluated]:
    """Of the checkpoints that were evaluated, oldest first."""
    found = {}
    for path in step_folders(folder):
        try:
            evaluation = open_checkpoint(path).meta.evaluation
        except UserError:  # damaged: it is never the best one
            continue
        if evaluation is not None:
            found[path] = evaluation
    return found
