"""sample.py --classes: numbers, names, and names that hold a comma."""

import dataclasses
from pathlib import Path

import pytest
from small_runs import python

from engine.errors import UserError
from engine.sampling import choose_labels
from engine.trainer.checkpoints import Checkpoint, find_checkpoint

COMMA = "lifting, then dropping"


@pytest.fixture
def checkpoint(cascade_run: Path) -> Checkpoint:
    """Of two classes; one name holds a comma."""
    found = find_checkpoint(cascade_run)
    return dataclasses.replace(
        found, meta=found.meta.model_copy(update={"classes": ["waving", COMMA]})
    )


@pytest.mark.parametrize(
    ("wanted", "labels"),
    [
        ("waving", [0]),
        (COMMA, [1]),  # alone, it needs no quotes
        (f'"{COMMA}"', [1]),
        (f'0,"{COMMA}", waving', [0, 1, 0]),
        (f'waving , "{COMMA}"', [0, 1]),
        ("1,0", [1, 0]),
    ],
)
def test_names_with_commas(checkpoint: Checkpoint, wanted: str, labels: list[int]) -> None:
    assert choose_labels(wanted, len(labels), checkpoint) == labels


def test_a_name_with_quotes_doubles_them(checkpoint: Checkpoint) -> None:
    quoted = 'saying "hi", loudly'
    named = dataclasses.replace(
        checkpoint, meta=checkpoint.meta.model_copy(update={"classes": ["a", quoted]})
    )
    assert choose_labels('a,"saying ""hi"", loudly"', 2, named) == [0, 1]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (f"0,{COMMA}", "'lifting' is neither a class name nor 0 to 1"),
        ('0,"lifting', "cannot be read as CSV"),
        ('"waving"x', "cannot be read as CSV"),
        ("", "'' is neither a class name nor 0 to 1"),
    ],
)
def test_mistakes_in_class_names(checkpoint: Checkpoint, wanted: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose_labels(wanted, None, checkpoint)


def test_help_tells_how_to_ask_for_a_comma() -> None:
    assert '"lifting, then dropping"' in " ".join(python("engine/sample.py", "--help").out.split())
