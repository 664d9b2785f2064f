"""Networks from a configuration: the one place that reads sizes out of it."""

import torch

from engine.configuration import Config, Stage
from engine.models.cascade import JointGenerator
from engine.models.discriminators import (
    Discriminators,
    MatchingDiscriminator,
    SpatialDiscriminator,
    TemporalDiscriminator,
)
from engine.models.generator import ClipGenerator
from engine.models.upsampler import UpsamplingGenerator


def compute_dtype(stage: Stage) -> torch.dtype:
    """What a stage's activations are computed in."""
    return torch.bfloat16 if stage.training.precision == "bf16" else torch.float32


def build_generator(config: Config, stage_number: int) -> ClipGenerator | UpsamplingGenerator:
    """The generator of one stage, initialised from the global random state."""
    stage = config.stages[stage_number]
    sizes = stage.generator
    if stage_number == 1:
        return ClipGenerator(
            resolution=stage.resolution,
            channels=sizes.channels,
            multipliers=sizes.multipliers,
            temporal=sizes.temporal,
            num_classes=config.data.num_classes,
            latent_size=sizes.latent_size,
            class_embedding_size=sizes.class_embedding_size,
            compute_dtype=compute_dtype(stage),
        )
    low = config.upsampling(stage_number)
    return UpsamplingGenerator(
        resolution=stage.resolution,
        channels=sizes.channels,
        multipliers=sizes.multipliers,
        temporal=sizes.temporal,
        low_resolution=low.resolution,
        frame_step=low.frame_step,
        num_classes=config.data.num_classes,
        latent_size=sizes.latent_size,
        class_embedding_size=sizes.class_embedding_size,
        compute_dtype=compute_dtype(stage),
    )


def build_joint_generator(config: Config, stage_number: int) -> JointGenerator:
    """Stages 1 to `stage_number` as one network (Appendix H)."""
    return JointGenerator(
        [build_generator(config, number) for number in range(1, stage_number + 1)], config
    )


def build_discriminators(config: Config, stage_number: int) -> Discriminators:
    """The discriminators of one stage: matching from stage 2 on, unless switched off."""
    stage = config.stages[stage_number]
    sizes, num_classes, dtype = stage.discriminators, config.data.num_classes, compute_dtype(stage)
    spatial = SpatialDiscriminator(
        resolution=stage.resolution,
        channels=sizes.channels,
        multipliers=sizes.multipliers,
        num_classes=num_classes,
        compute_dtype=dtype,
    )
    temporal = TemporalDiscriminator(
        resolution=stage.resolution,
        channels=sizes.channels,
        multipliers=sizes.multipliers,
        num_classes=num_classes,
        pool_time=sizes.pool_time,
        compute_dtype=dtype,
    )
    if stage_number == 1 or not sizes.matching:
        return Discriminators(spatial, temporal)
    low = config.upsampling(stage_number)
    matching = MatchingDiscriminator(
        low_resolution=low.resolution,
        frame_step=low.frame_step,
        channels=sizes.channels,
        multipliers=sizes.multipliers,
        num_classes=num_classes,
        pool_time=sizes.pool_time,
        compute_dtype=dtype,
    )
    return Discriminators(spatial, temporal, matching)
