"""Which checkpoints of a stage are kept: the newest ones, and the best one that was evaluated.

A checkpoint of a step that was evaluated has the values in its meta.json. So its folder alone tells
which one is best, also after a restart. `checkpoints/best` is a link to it.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.durable_files import PARTIAL, writing
from engine.trainer.checkpoints import BEST, META, step_folders

PREFIX, OF_REAL = "evaluation/", "/real"


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation during training found."""

    measured: Mapping[str, float]
    """Values by metric."""
    of_real: Mapping[str, float]
    """The same of real clips, compared with as many others."""
    metric: str
    """By which the best checkpoint is chosen."""
    badness: float
    """Of that metric: lower is better."""
    protocol: str
    """A fingerprint: values of different ones do not compare."""

    def to_tree(self) -> dict[str, Any]:
        """For meta.json."""
        return asdict(self)

    def to_log(self) -> dict[str, float]:
        """`evaluation/fvd`, `evaluation/fvd/real` and so on."""
        measured = {PREFIX + name: value for name, value in self.measured.items()}
        return measured | {PREFIX + name + OF_REAL: value for name, value in self.of_real.items()}

    def line(self, step: int, *, is_best: bool) -> str:
        """For the console."""
        shown = ", ".join(f"{name} {value:.4g}" for name, value in self.measured.items())
        found = f", the best {self.metric} so far" if is_best else ""
        return f"evaluation at step {step}: {shown}{found}"

    def improves_on(self, folder: Path) -> bool:
        """Whether no checkpoint in `folder` that compares is as good."""
        others = [tree for tree in _evaluations(folder).values() if self._compares(tree)]
        return all(self.badness < tree["badness"] for tree in others)

    def _compares(self, tree: Mapping[str, Any]) -> bool:
        return (tree["metric"], tree["protocol"]) == (self.metric, self.protocol)


def best_checkpoint(folder: Path) -> Path | None:
    """The best evaluated checkpoint in `folder`, the first of equals; None where none is evaluated.

    Of those that compare with the newest evaluated one: a resumed run may have changed what it
    measures.
    """
    evaluations = _evaluations(folder)
    if not evaluations:
        return None
    newest = Evaluated(**list(evaluations.values())[-1])
    comparable = {path: tree for path, tree in evaluations.items() if newest._compares(tree)}
    return min(comparable, key=lambda path: comparable[path]["badness"])


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


def _evaluations(folder: Path) -> dict[Path, dict[str, Any]]:
    """`Evaluated` trees of the checkpoints that have one, oldest first."""
    found = {}
    for path in step_folders(folder):
        try:
            tree = json.loads((path / META).read_text()).get("evaluation")
        except (OSError, ValueError, AttributeError):  # damaged: it is never the best one
            continue
        if tree is not None:
            found[path] = tree
    return found
