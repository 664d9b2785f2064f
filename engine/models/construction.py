"""Networks from a configuration: the one place that reads sizes out of it."""

from typing import Any

import torch

from engine.configuration import Config, Stage
from engine.models.activation_checkpointing import set_checkpointing
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


def forbid_tf32() -> None:
    """In this process: cuDNN's convolutions use it by default, and `precision: fp32` means fp32."""
    torch.backends.cudnn.allow_tf32 = False


def build_generator(config: Config, stage_number: int) -> ClipGenerator | UpsamplingGenerator:
    """The generator of one stage, initialised from the global random state."""
    stage = config.stages[stage_number]
    sizes = stage.generator
    common: dict[str, Any] = {
        "resolution": stage.resolution,
        "channels": sizes.channels,
        "multipliers": sizes.multipliers,
        "temporal": sizes.temporal,
        "num_classes": config.data.num_classes,
        "latent_size": sizes.latent_size,
        "class_embedding_size": sizes.class_embedding_size,
        "compute_dtype": compute_dtype(stage),
    }
    generator: ClipGenerator | UpsamplingGenerator
    if stage_number == 1:
        generator = ClipGenerator(**common)
    else:
        low = config.upsampling(stage_number)
        generator = UpsamplingGenerator(
            low_resolution=low.resolution,
            frame_step=low.frame_step,
            low_frames=sizes.low_frames,
            edge_frames=sizes.edge_frames,
            **common,
        )
    set_checkpointing(generator, stage.training.checkpointing)
    return generator


def build_joint_generator(config: Config, stage_number: int) -> JointGenerator:
    """Stages 1 to `stage_number` as one network (Appendix H)."""
    generator = JointGenerator(
        [build_generator(config, number) for number in range(1, stage_number + 1)], config
    )
    # Of the stage that trains, whatever the earlier ones trained with.
    set_checkpointing(generator, config.stages[stage_number].training.checkpointing)
    return generator


def build_discriminators(config: Config, stage_number: int) -> Discriminators:
    """The discriminators of one stage: matching from stage 2 on, unless switched off."""
    stage = config.stages[stage_number]
    sizes = stage.discriminators
    common: dict[str, Any] = {
        "channels": sizes.channels,
        "multipliers": sizes.multipliers,
        "num_classes": config.data.num_classes,
        "minibatch_stddev": sizes.minibatch_stddev,
        "compute_dtype": compute_dtype(stage),
    }
    spatial = SpatialDiscriminator(resolution=stage.resolution, **common)
    common["pool_time"] = sizes.pool_time
    temporal = TemporalDiscriminator(resolution=stage.resolution, **common)
    matching = None
    if stage_number > 1 and sizes.matching:
        low = config.upsampling(stage_number)
        matching = MatchingDiscriminator(
            low_resolution=low.resolution, frame_step=low.frame_step, **common
        )
    discriminators = Discriminators(spatial, temporal, matching)
    set_checkpointing(discriminators, stage.training.checkpointing)
    return discriminators
