"""Trainers of a stage without a data set, around DeepSpeed or around plain PyTorch in its place.

The training step is the engine's own in all of them (engine/trainer/step.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from os import environ
from typing import Any, NamedTuple

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn

from engine.configuration import Config
from engine.models import build_discriminators, build_generator
from engine.models.cascade import Cascade
from engine.models.norms import fix_norm_statistics, frame_norms
from engine.trainer.acceleration import choose_convolutions
from engine.trainer.deepspeed_engines import make_engine
from engine.trainer.networks import LATENTS, StageBuilder
from engine.trainer.previous import PreviousStages, load_cascade
from engine.trainer.ranks import Ranks
from engine.trainer.reals import Reals
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
        batch = stage.training.samples_per_pass
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


class PlainEngine:
    """What `Trainer` asks of a DeepSpeed engine, in PyTorch: one process, Adam, no accumulation."""

    def __init__(self, network: nn.Module, lr: float, betas: tuple[float, float]) -> None:
        self.module = network
        # `foreach` is what PyTorch itself chooses on CUDA, said here for the meta device.
        self.optimizer = torch.optim.Adam(network.parameters(), lr, betas, foreach=True)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.module.parameters()).device

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """The network's forward pass."""
        return self.module(*arguments, **named)

    def backward(self, loss: Tensor) -> None:
        """Into the parameters' `.grad`."""
        loss.backward()

    def is_gradient_accumulation_boundary(self) -> bool:
        """Every micro-batch is an update."""
        return True

    def step(self) -> None:
        """Update, and forget the gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad()


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


def stage_builder(config: Config, number: int, ranks: Ranks) -> StageBuilder:
    """As engine/train.py makes it, with untrained earlier stages and without a data set."""
    num_classes = config.data.num_classes or 1
    facts = DataFacts(
        classes=tuple(map(str, range(num_classes))),
        class_counts=(1,) * num_classes,
        frames_per_second=25.0,
    )
    builder = StageBuilder(config, number, ranks, facts)
    if number > 1 and config.stages[number].training.condition_on == "generated":
        with ranks.device:
            states = {n: build_generator(config, n).state_dict() for n in range(1, number)}
        cascade = load_cascade(config, states, ranks.device)
        fix_statistics(cascade, config)
        builder = replace(builder, previous=PreviousStages(cascade, ""))
    return builder


def fix_statistics(cascade: Cascade, config: Config) -> None:
    """Frozen stages run on fixed statistics: here mean 0 and variance 1, which cost the same."""
    for number, generator in enumerate(cascade.generators, start=1):
        num_frames = config.stages[number].num_frames
        statistics: dict[str, Tensor] = {}
        for name, norm in frame_norms(generator).items():
            channels = norm.gain.normalized.u.new_zeros(num_frames, norm.gain.normalized.u.numel())
            statistics |= {f"{name}.mean": channels, f"{name}.var": torch.ones_like(channels)}
        fix_norm_statistics(generator, statistics)


def make_trainer(config: Config, number: int, ranks: Ranks) -> Trainer:
    """The trainer that users run."""
    builder = stage_builder(config, number, ranks)
    return builder.trainer(SameClips(config, number, ranks.device))


def build_networks(builder: StageBuilder) -> tuple[nn.Module, nn.Module]:
    """G and D, freshly initialised on the builder's device."""
    torch.manual_seed(0)
    with builder.ranks.device:
        return (
            build_generator(builder.config, builder.number),
            build_discriminators(builder.config, builder.number),
        )


def plain_engines(builder: StageBuilder) -> tuple[PlainEngine, PlainEngine]:
    """G's and D's in plain PyTorch."""
    training = builder.config.stages[builder.number].training
    generator, discriminators = build_networks(builder)
    return (
        PlainEngine(generator, training.generator_lr, training.adam_betas),
        PlainEngine(discriminators, training.discriminator_lr, training.adam_betas),
    )


def deepspeed_engines(builder: StageBuilder) -> tuple[DeepSpeedEngine, DeepSpeedEngine]:
    """G's and D's, as the engine makes them for one rank."""
    training = builder.config.stages[builder.number].training
    generator, discriminators = build_networks(builder)
    one: dict[str, Any] = {"training": training, "world_size": 1, "accumulation_steps": 1}
    return (
        make_engine(generator, lr=training.generator_lr, **one),
        make_engine(discriminators, lr=training.discriminator_lr, **one),
    )


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


def at_micro_batch(builder: StageBuilder, config: Config, trainer: Trainer) -> Trainer:
    """The same engines at the micro-batch of another configuration."""
    return trainer_around(replace(builder, config=config), trainer.g_engine, trainer.d_engine)
