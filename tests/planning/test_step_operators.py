"""What a GPU's host has to launch in an iteration: operators, whatever the micro-batch is."""

from pathlib import Path

import pytest

from benchmarks.bench_accounting import count_step_operators
from engine.configuration import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
READ = ("stages.2.training.condition_on=data", "stages.2.training.sample_bank=null")
GENERATED = ("stages.2.training.sample_bank=null",)


@pytest.mark.parametrize(
    ("stage_number", "overrides", "most"),
    # Before biases and norms had theirs at once: 3303, 2744 and 4664.
    [(1, (), 2850), (2, READ, 1850), (2, GENERATED, 3600)],
    ids=["stage 1", "stage 2, windows of a bank or of clips", "stage 2, windows generated anew"],
)
def test_operators_of_an_iteration(
    stage_number: int, overrides: tuple[str, ...], most: int
) -> None:
    config = load_config(CONFIGS / "kinetics600.yaml", ["training.micro_batch=4", *overrides])
    found = count_step_operators(config, stage_number)
    print(found)
    assert 0.95 * most < found <= most


def test_they_do_not_depend_on_the_micro_batch() -> None:
    """But for what many samples need in parts."""
    counts = [
        count_step_operators(
            load_config(CONFIGS / "kinetics600.yaml", [f"training.micro_batch={n}", *READ]), 2
        )
        for n in (4, 32)
    ]
    assert counts[0] == counts[1]
