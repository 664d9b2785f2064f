"""Checkpoints with next to nothing in them."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.durable_files import writing
from engine.trainer.checkpoint_meta import Evaluated, RunFacts, file_names
from engine.trainer.checkpoints import (
    META,
    begin_checkpoint,
    finish_checkpoint,
    list_files,
    save_tensors,
    step_name,
)

FACTS = RunFacts(
    stage=1,
    world_size=1,
    zero_stage=1,
    previous=None,
    config={},
    classes=[],
    class_counts=[],
    frames_per_second=25.0,
    evaluation=None,
)
"""Of no configuration."""


def write_small(
    folder: Path,
    step: int,
    value: int = 0,
    *,
    evaluation: Evaluated | None = None,
    last: Callable[[], object] = lambda: None,
) -> Path:
    """A checkpoint whose files hold `value`; `last` is called when they are written."""

    partial = begin_checkpoint(folder, step, make=True)
    with writing(folder / step_name(step)):
        for name in file_names(1):
            save_tensors(partial / name, {"value": value})
        last()
    list_files(partial, 0, sorted(file_names(1)))
    facts = FACTS.model_copy(update={"evaluation": evaluation})
    return finish_checkpoint(partial, step, facts, 1)


def forge_meta(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change meta.json, and its own hash with it, as whoever knows the form can."""
    tree = json.loads((checkpoint / META).read_text())
    del tree["sha256"]
    change(tree)
    digest = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
    (checkpoint / META).write_text(json.dumps({**tree, "sha256": digest}))
