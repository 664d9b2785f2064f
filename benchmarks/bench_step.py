"""A training step of the sample configuration, references against what runs by itself."""

from functools import partial
from typing import Any

import torch

import kernels
from benchmarks.correctness import check_networks
from benchmarks.session import OURS, REFERENCE, Case, Session
from benchmarks.setups import CONFIGS
from benchmarks.trainers import make_trainer
from engine.configuration import load_config
from engine.models.construction import compute_dtype
from engine.trainer.ranks import Ranks


def test_step(session: Session, benchmark: Any, ranks: Ranks) -> None:
    """Two D updates and one G update of stage 2, with the frozen stage 1 that feeds them."""
    config = load_config(CONFIGS / "sample.yaml")
    stage = config.stages[2]
    torch.manual_seed(0)
    trainer = make_trainer(config, 2, ranks)
    reference = partial(kernels.use, "reference")
    with reference():  # whose frozen stage divides its weights in every pass
        torch.manual_seed(0)
        other = make_trainer(config, 2, ranks)

    def step_of_references() -> None:
        with reference():
            other.train_step()

    case = Case(
        operator="training_step",
        shape=f"sample.yaml stage 2 batch {stage.training.samples_per_pass}",
        direction="step",
        dtype=compute_dtype(stage),
        check=partial(check_networks, trainer, config, reference),
        sides=lambda: {OURS: trainer.train_step, REFERENCE: step_of_references},
        # Neighbouring CPU steps differ by a tenth on a machine that is shared; five rounds do not
        # settle a ratio to less.
        patience=60,
    )
    session.run(case, benchmark)
