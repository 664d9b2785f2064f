"""Trainers of a stage without a data set, around DeepSpeed or around plain PyTorch in its place.

The training step is the engine's own in all of them (engine/trainer/step.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from os import environ
from typing import Any

import torch
from torch import nn

import kernels
from engine.configuration import Config
from engine.models import build_discriminators, build_generator
from engine.models.operators import hand_operators
from engine.planning.counters import Phases
from engine.planning.forward_pass import frozen_stages
from engine.planning.meta_step import EmptyClips, EngineWithoutOptimizer, UnfilledClips
from engine.trainer.acceleration import choose_convolutions
from engine.trainer.deepspeed_engines import make_engine
from engine.trainer.networks import LATENTS, StageBuilder
from engine.trainer.previous import PreviousStages
from engine.trainer.ranks import Ranks
from engine.trainer.reals import Reals
from engine.trainer.step import Trainer
from engine.video.dataset import DataFacts


class SameClips(EmptyClips):
    """A loader without decoding: one batch of noise, again and again."""

    def __init__(self, config: Config, number: int, device: torch.device) -> None:
        super().__init__(config, number, device)
        video = torch.rand(self._batch, *self._shape, device=device) * 2 - 1
        labels = torch.arange(self._batch, device=device) % (config.data.num_classes or 1)
        self._clips = UnfilledClips(video.permute(0, 1, 4, 2, 3), labels)

    def __next__(self) -> UnfilledClips:
        return self._clips


class AdamEngine(EngineWithoutOptimizer):
    """The planner's engine with PyTorch's Adam: one process, no accumulation."""

    def __init__(self, network: nn.Module, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(network, next(network.parameters()).device, Phases())
        # `foreach` is what PyTorch itself chooses on CUDA, said here for the meta device.
        self.optimizer = torch.optim.Adam(network.parameters(), lr, betas, foreach=True)

    def step(self) -> None:
        """Update, and forget the gradients."""
        self.optimizer.step()
        super().step()


@contextmanager
def one_rank(device: torch.device) -> Iterator[Ranks]:
    """A job of one, connected within this context."""
    before = dict(environ)
    ranks = Ranks(rank=0, world_size=1, local_rank=0, device=device)
    ranks.connect()
    choose_convolutions(benchmark=True)
    try:
        yield ranks
    finally:
        ranks.disconnect()
        environ.clear()
        environ.update(before)


def stage_builder(
    config: Config, number: int, ranks: Ranks, operators: Any = kernels
) -> StageBuilder:
    """As engine/train.py makes it, with untrained earlier stages and without a data set.

    The earlier stages run on `operators`. Their fixed statistics are mean 0 and variance 1, which
    cost the same as others.
    """
    num_classes = config.data.num_classes or 1
    facts = DataFacts(
        classes=tuple(map(str, range(num_classes))),
        class_counts=(1,) * num_classes,
        frames_per_second=25.0,
    )
    builder = StageBuilder(config, number, ranks, facts)
    if number > 1 and config.stages[number].training.condition_on == "generated":
        with ranks.device:
            frozen = frozen_stages(config, number, operators)
        builder = replace(builder, previous=PreviousStages(frozen, ""))
    return builder


def make_trainer(config: Config, number: int, ranks: Ranks) -> Trainer:
    """The trainer that users run."""
    builder = stage_builder(config, number, ranks)
    return builder.trainer(SameClips(config, number, ranks.device))


def make_engines(builder: StageBuilder, *, plain: bool, operators: Any = kernels) -> list[Any]:
    """G's and D's, freshly initialised: for one rank as training has them, or plain PyTorch's.

    The networks are handed `operators`.
    """
    training = builder.config.stages[builder.number].training
    torch.manual_seed(0)
    with builder.ranks.device:
        networks = {
            build_generator(builder.config, builder.number): training.generator_lr,
            build_discriminators(builder.config, builder.number): training.discriminator_lr,
        }
    for network in networks:
        hand_operators(network, operators)
    if plain:
        return [AdamEngine(network, lr, training.adam_betas) for network, lr in networks.items()]
    one: dict[str, Any] = {"training": training, "world_size": 1, "accumulation_steps": 1}
    return [make_engine(network, lr=lr, **one) for network, lr in networks.items()]


def trainer_around(builder: StageBuilder, g_engine: Any, d_engine: Any) -> Trainer:
    """A trainer of engines that are there already, at the builder's micro-batch."""
    config, number = builder.config, builder.number
    reals = Reals(SameClips(config, number, builder.ranks.device), config, number)
    latents = builder.latents(builder.seed(LATENTS))
    return Trainer(
        stage_number=number,
        stage=config.stages[number],
        g_engine=g_engine,
        d_engine=d_engine,
        fakes=builder.fakes(latents, reals),
        reals=reals,
        random=latents.random,
        accumulation_steps=1,
        average=None,
    )
