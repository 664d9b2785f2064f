"""A whole training step, references against what runs by itself: the trainer that users run."""

import math
import os
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import kernels
from benchmarks.calls import CONFIGS
from benchmarks.correctness import Refused
from benchmarks.operators import OURS, REFERENCE, Case
from benchmarks.session import Session
from engine.configuration import Config, load_config
from engine.models import build_generator
from engine.models.construction import compute_dtype
from engine.models.discriminators import draw_frame_indices
from engine.trainer.networks import StageBuilder
from engine.trainer.previous import PreviousStages, load_cascade
from engine.trainer.ranks import Ranks
from engine.trainer.step import Trainer
from engine.video.dataset import DataFacts


class Clips(NamedTuple):
    """One batch of a loader."""

    video_BTCHW: Tensor
    labels_B: Tensor


class SameClips:
    """A loader without decoding: one batch of noise, again and again."""

    def __init__(self, config: Config, number: int, device: torch.device) -> None:
        stage = config.stages[number]
        shape = stage.num_frames, stage.resolution, stage.resolution, 3
        batch = stage.training.micro_batch
        video = torch.rand(batch, *shape, device=device) * 2 - 1
        labels = torch.arange(batch, device=device) % (config.data.num_classes or 1)
        self._clips = Clips(video.permute(0, 1, 4, 2, 3), labels)

    def __next__(self) -> Clips:
        return self._clips

    def state_dict(self) -> dict[str, Any]:
        """No position."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do."""


@pytest.fixture
def ranks(session: Session) -> Iterator[Ranks]:
    """A job of one, connected for the test."""
    before = dict(os.environ)
    ranks = Ranks(rank=0, world_size=1, local_rank=0, device=session.device)
    ranks.connect()
    yield ranks
    ranks.disconnect()
    os.environ.clear()
    os.environ.update(before)


def make_trainer(config: Config, number: int, ranks: Ranks) -> Trainer:
    """As engine/train.py makes it, with untrained earlier stages and without a data set."""
    num_classes = config.data.num_classes or 1
    facts = DataFacts(
        classes=tuple(map(str, range(num_classes))),
        class_counts=(1,) * num_classes,
        frames_per_second=25.0,
    )
    builder = StageBuilder(config, number, ranks, facts)
    if number > 1:
        states = {n: build_generator(config, n).state_dict() for n in range(1, number)}
        builder.previous = PreviousStages(load_cascade(config, states, ranks.device), "")
    return builder.trainer(SameClips(config, number, ranks.device))


def outputs(trainer: Trainer, config: Config) -> dict[str, Tensor]:
    """G's video and D's scores of it, for inputs that are the same in every call."""
    number, stage = trainer.stage_number, config.stages[trainer.stage_number]
    device, batch = trainer.g_engine.device, stage.training.micro_batch
    random = torch.Generator().manual_seed(3)
    window = config.upsampling(number)
    z = torch.randn(batch, stage.generator.latent_size, generator=random).to(device)
    low = torch.rand(
        batch, window.num_frames, 3, window.resolution, window.resolution, generator=random
    ).to(device)
    labels = torch.arange(batch, device=device) % (config.data.num_classes or 1)
    frames = draw_frame_indices(
        batch, stage.num_frames, stage.discriminators.spatial_frames, random
    ).to(device)
    with torch.no_grad():
        video = trainer.g_engine.module(z, labels, low)
        scores = trainer.d_engine.module(video, labels, low, frames).all
    return {"G's video": video, "D's scores": scores}


def check_networks(trainer: Trainer, config: Config) -> None:
    """Both forms of the networks must compute the same. Raises Refused.

    How far rounding errors grow in a network is measured: by one random rounding of every weight.
    A sum of K terms makes √K of them, and two forms err independently, hence 2·√K times that.
    """
    got = outputs(trainer, config)
    with kernels.use("reference"):
        usual = outputs(trainer, config)
    networks = trainer.g_engine.module, trainer.d_engine.module
    weights = [p for network in networks for p in network.parameters()]
    rounding = torch.finfo(compute_dtype(config.stages[trainer.stage_number])).eps / 2
    kept = [weight.detach().clone() for weight in weights]
    with torch.no_grad(), kernels.use("reference"):
        for weight in weights:
            weight.mul_(1 + rounding * (2 * torch.rand_like(weight) - 1))
        moved = outputs(trainer, config)
        for weight, before in zip(weights, kept, strict=True):
            weight.copy_(before)
    num_terms = max(weight[0].numel() for weight in weights)
    for name, value in usual.items():
        difference, response = (_distance(v[name], value) for v in (got, moved))
        if not difference <= 2 * math.sqrt(num_terms) * response:
            raise Refused(
                f"{name} differ by {difference:.3g}; one rounding of every weight moves them by "
                f"{response:.3g}"
            )


def _distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


STEPS = {
    "sample": ("sample.yaml", 2, ()),
    # One micro-batch per update: accumulation repeats the same work.
    "kinetics600": ("kinetics600.yaml", 2, ("training.global_batch=4",)),
}


@pytest.mark.parametrize("name", STEPS)
def test_step(session: Session, benchmark: Any, ranks: Ranks, name: str) -> None:
    """Two D updates and one G update of stage 2, with the frozen stage 1 that feeds them."""
    file, number, overrides = STEPS[name]
    if name == "kinetics600" and session.device.type != "cuda":
        pytest.skip("a step of the paper's size needs a GPU")
    if name == "kinetics600" and session.quick:
        pytest.skip("--quick leaves out the step of the paper's size")
    config = load_config(CONFIGS / file, overrides)
    stage = config.stages[number]
    torch.manual_seed(0)
    trainer = make_trainer(config, number, ranks)

    def step_of_references() -> None:
        with kernels.use("reference"):
            trainer.train_step()

    case = Case(
        operator="training_step",
        shape=f"{file} stage {number} batch {stage.training.micro_batch}",
        direction="step",
        dtype=compute_dtype(stage),
        cost=None,
        check=partial(check_networks, trainer, config),
        sides=lambda: {OURS: trainer.train_step, REFERENCE: step_of_references},
    )
    session.run(case, benchmark)
