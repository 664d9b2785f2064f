"""Trainers of the tiny configuration that need neither files nor a loader."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.configuration import Config
from engine.models.construction import build_generator
from engine.trainer.networks import StageBuilder
from engine.trainer.previous import PreviousStages, load_cascade
from engine.trainer.ranks import Ranks
from engine.trainer.step import Trainer
from engine.video.dataset import DataFacts

FACTS = DataFacts(classes=("a", "b"), class_counts=(4, 4), frames_per_second=25.0)


class Clips(NamedTuple):
    video_BTCHW: Tensor
    labels_B: Tensor


class RandomClips:
    """Clips of uniform noise, `batch` at a time, the same in any batch size."""

    def __init__(self, config: Config, number: int, batch: int) -> None:
        stage = config.stages[number]
        self._shape = (stage.num_frames, 3, stage.resolution, stage.resolution)
        self._batch, self.position = batch, 0

    def __next__(self) -> Clips:
        numbers = range(self.position, self.position + self._batch)
        self.position += self._batch
        clips = [
            torch.rand(self._shape, generator=torch.Generator().manual_seed(n)) * 2 - 1
            for n in numbers
        ]
        return Clips(torch.stack(clips), torch.tensor([n % 2 for n in numbers]))

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def make(
    ranks: Ranks,
    config: Config,
    number: int = 1,
    builder_class: type[StageBuilder] = StageBuilder,
    clips: Any = None,
) -> Trainer:
    """A trainer on random clips, whose frozen earlier stages are as initialised."""
    builder = builder_class(config, number, ranks, FACTS)
    if number > 1:
        torch.manual_seed(7)
        states = {n: build_generator(config, n).state_dict() for n in range(1, number)}
        previous = PreviousStages(load_cascade(config, states, ranks.device), "")
        builder = replace(builder, previous=previous)
    return builder.trainer(
        clips or RandomClips(config, number, config.stages[number].training.samples_per_pass)
    )
