"""The same global batch for any number of ranks.

In training every rank draws its own latents, labels, frames and clips. Here all ranks draw those
of the whole batch alike, and each keeps its share: B samples of W·B for rank r of W.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from small_trainers import Clips, RandomClips, make
from torch import Tensor, nn

from engine.configuration import Config
from engine.trainer import step
from engine.trainer.fakes import FakeBatch, Fakes, Inputs, LatentSource
from engine.trainer.networks import StageBuilder
from engine.trainer.ranks import Ranks
from engine.trainer.reals import Reals
from engine.trainer.step import Trainer


def make_sharing(ranks: Ranks, config: Config, number: int) -> Trainer:
    """A trainer of a rank's share of random batches. Its steps run within `frames_shared`."""
    clips = _SharedClips(ranks, config, number)
    return make(ranks, config, number, _SharingBuilder, clips)


@contextlib.contextmanager
def frames_shared(ranks: Ranks, micro_batch: int) -> Iterator[None]:
    """Of the frames that the spatial discriminator judges each rank takes its samples'."""
    draw = step.draw_frame_indices

    def drawn(
        batch: int, num_frames: int, num_drawn: int, generator: torch.Generator | None = None
    ) -> Tensor:
        whole_BK = draw(batch * ranks.world_size, num_frames, num_drawn, generator)
        # D judges reals and fakes in one batch: each of these parts is shared.
        parts = whole_BK.chunk(batch // micro_batch)
        return torch.cat([_share(part_BK, ranks) for part_BK in parts])

    step.draw_frame_indices = drawn
    try:
        yield
    finally:
        step.draw_frame_indices = draw


def _share(whole: Any, ranks: Ranks) -> Any:
    """A rank's samples of tensors [W·B, ...]; anything else is the same for all."""
    return whole.chunk(ranks.world_size)[ranks.rank] if isinstance(whole, Tensor) else whole


class _SharingBuilder(StageBuilder):
    def seed(self, stream: str, rank: int = 0) -> int:
        return super().seed(stream)

    def fakes(self, latents: LatentSource, reals: Reals | None) -> Fakes:
        return _SharedFakes(super().fakes(latents, reals), self.ranks)


class _SharedFakes:
    def __init__(self, fakes: Fakes, ranks: Ranks) -> None:
        self._fakes, self._ranks = fakes, ranks

    def draw(self, batch_size: int) -> Inputs:
        whole = self._fakes.draw(batch_size * self._ranks.world_size)
        return {name: _share(value, self._ranks) for name, value in whole.items()}

    def run(self, generator: nn.Module, inputs: Inputs) -> FakeBatch:
        return self._fakes.run(generator, inputs)


class _SharedClips(RandomClips):
    def __init__(self, ranks: Ranks, config: Config, number: int) -> None:
        batch = config.stages[number].training.samples_per_pass * ranks.world_size
        super().__init__(config, number, batch)
        self._ranks = ranks

    def __next__(self) -> Clips:
        return Clips(*(_share(whole, self._ranks) for whole in super().__next__()))
