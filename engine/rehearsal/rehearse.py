"""A rehearsal of rank 0 of a job of many GPUs, at full size: its clips, batch, step and files.

Read `rehearse`. The real code runs the configuration's checks, the index, sampler and loader up to
the first decoded frame, the networks' shapes, DeepSpeed's partitioning, the training step and the
saving of a checkpoint; `stand_ins.py` describes the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from engine.batches import accumulation_steps
from engine.configuration import Config, Training, with_training
from engine.models.cascade import GeneratorCascade
from engine.models.construction import build_generator
from engine.models.norms import fix_norm_statistics, frame_norms
from engine.rehearsal.layout import (
    UNKNOWN_HASH,
    CheckpointLayout,
    Partition,
    checkpoint_layout,
    partition_of,
)
from engine.rehearsal.shares import Shares, find_index, share_epoch
from engine.rehearsal.stand_ins import META, ShapesOnly
from engine.trainer.networks import StageBuilder
from engine.trainer.previous import PreviousStages
from engine.trainer.ranks import Ranks
from engine.trainer.stage_plan import needs_previous
from engine.trainer.step import Trainer
from engine.video.dataset import describe
from engine.video.loader import ClipLoader, LoadedClips

ZERO_STAGES = (0, 1, 2, 3)
NOT_REHEARSED = {
    "adam": "auto",
    "sample_bank": None,
    "offload_optimizer": False,
    "acceleration": "none",
}
"""Settings that a rehearsal does without: they want values, or memory that a host has."""


@dataclass(frozen=True)
class Rehearsal:
    """The findings of a rehearsal."""

    config: Config
    number: int
    world_size: int
    num_accumulated: int
    """Micro-batches that a real update accumulates; the rehearsed one has a single one."""
    data: str
    shares: Shares
    partitions: list[Partition]
    layout: CheckpointLayout
    num_operators: int
    """Of the rehearsed step, on rank 0."""
    collectives: dict[str, tuple[int, int]]
    """Of the rehearsed step, on rank 0: kind -> how many, bytes of the tensors given to them."""

    @property
    def left_out(self) -> list[str]:
        """The configured settings that were not rehearsed."""
        settings = dict(self.training)
        return [name for name, value in NOT_REHEARSED.items() if settings[name] != value]

    @property
    def training(self) -> Training:
        """The stage's settings."""
        return self.config.stages[self.number].training


def rehearse(
    config: Config, number: int, ranks: Ranks, *, data_asked: bool, say: Callable[[str], None]
) -> Rehearsal:
    """Rehearse stage `number` as rank 0 of a `fake_job`; `config` is what its ranks run.

    Writes nothing under --out. `data_asked`: `config.data.path` was named for this run and must be
    there. `say` hears what is going on. Raises UserError for data, as the real run would.
    """
    training = config.stages[number].training
    say("data: opening the index")
    source = find_index(config, asked=data_asked)
    facts = describe(source.index, config.data, config.stages[number].num_source_frames)
    builder = StageBuilder(config, number, ranks, facts)
    loader = replace(builder, config=_any_decoder(config)).loader(source.index)
    shares = share_epoch(
        loader.sampler, world_size=ranks.world_size, micro_batch=training.samples_per_pass
    )
    clips = _ClipShapes(loader, config, number)
    with ShapesOnly():
        builder = replace(builder, previous=_previous_stages(config, number))
        say(f"ZeRO-{training.zero_stage}: building rank 0's networks and engines")
        trainer = _one_micro_batch(builder).trainer(clips)
    with ShapesOnly(small_copies=True) as training_step:
        say("step: training")
        trainer.train_step()
    with ShapesOnly():
        own = _partitions(trainer, training.zero_stage, ranks)
        layout = checkpoint_layout(trainer, builder)
        partitions = []
        for zero_stage in ZERO_STAGES:
            if zero_stage == training.zero_stage:
                partitions += own
                continue
            say(f"ZeRO-{zero_stage}: building engines to compare")
            other = replace(builder, config=with_training(config, number, zero_stage=zero_stage))
            partitions += _partitions(_one_micro_batch(other).trainer(clips), zero_stage, ranks)
    return Rehearsal(
        config=config,
        number=number,
        world_size=ranks.world_size,
        num_accumulated=accumulation_steps(training, ranks.world_size),
        data=source.description,
        shares=shares,
        partitions=partitions,
        layout=layout,
        num_operators=training_step.num_operators,
        collectives={
            name: (count, training_step.collective_bytes[name])
            for name, count in training_step.collectives.items()
        },
    )


class _ClipShapes:
    """The loader's clips, never decoded."""

    def __init__(self, loader: ClipLoader, config: Config, number: int) -> None:
        stage = config.stages[number]
        batch, side = stage.training.samples_per_pass, stage.resolution
        self._loader = loader
        self._shape_BTHWC = (batch, stage.num_frames, side, side, 3)

    def __next__(self) -> LoadedClips:
        """Shaped and laid out as the loader's."""
        video_BTHWC = torch.empty(self._shape_BTHWC, device=META)
        labels_B = torch.empty(len(video_BTHWC), dtype=torch.int64, device=META)
        return LoadedClips(video_BTHWC.permute(0, 1, 4, 2, 3), labels_B)

    def state_dict(self) -> dict[str, Any]:
        """The real loader's, before its first batch."""
        return self._loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """For the loader."""
        self._loader.load_state_dict(state)


def _partitions(trainer: Trainer, zero_stage: int, ranks: Ranks) -> list[Partition]:
    engines = (("generator", trainer.g_engine), ("discriminators", trainer.d_engine))
    return [partition_of(e, name, zero_stage, ranks.world_size) for name, e in engines]


def _previous_stages(config: Config, number: int) -> PreviousStages | None:
    """The frozen stages' shapes, with statistics for the lengths that training gives them."""
    if not needs_previous(config, number):
        return None
    with META:
        networks = [build_generator(config, n) for n in range(1, number)]
        for n, network in enumerate(networks, start=1):
            num_frames = config.stages[n].num_frames
            statistics = {
                f"{name}.{which}": torch.empty(num_frames, len(norm.gain.normalized.u))
                for name, norm in frame_norms(network).items()
                for which in ("mean", "var")
            }
            fix_norm_statistics(network, statistics)
    return PreviousStages(GeneratorCascade(networks, config), UNKNOWN_HASH)


def _one_micro_batch(builder: StageBuilder) -> StageBuilder:
    """Accumulated micro-batches all do the same; one of them keeps a rehearsal short.

    Without `NOT_REHEARSED`, none of which changes a partition or a file.
    """
    training = builder.config.stages[builder.number].training
    global_batch = training.samples_per_pass * builder.ranks.world_size
    settings = {"global_batch": global_batch} | NOT_REHEARSED
    return replace(builder, config=with_training(builder.config, builder.number, **settings))


def _any_decoder(config: Config) -> Config:
    """Nothing is decoded, and the one asked for may need the GPU that is not here."""
    data = config.data.model_copy(update={"decoder": "auto"})
    return config.model_copy(update={"data": data})
