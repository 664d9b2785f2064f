"""The networks of SSW-GAN and DVD-GAN; start with `construction.build_generator`."""

from engine.models.cascade import GeneratorCascade, JointGenerator, draw_window_starts, take_windows
from engine.models.construction import (
    build_discriminators,
    build_generator,
    build_joint_generator,
)
from engine.models.discriminators import Discriminators, Scores, draw_frame_indices
from engine.models.generator import ClipGenerator
from engine.models.norms import collect_statistics, fix_norm_statistics, norm_statistics
from engine.models.spectral import SpectralWeight, spectral_weights, update_spectral_norm
from engine.models.upsampler import UpsamplingGenerator

__all__ = [
    "ClipGenerator",
    "Discriminators",
    "GeneratorCascade",
    "JointGenerator",
    "Scores",
    "SpectralWeight",
    "UpsamplingGenerator",
    "build_discriminators",
    "build_generator",
    "build_joint_generator",
    "collect_statistics",
    "draw_frame_indices",
    "draw_window_starts",
    "fix_norm_statistics",
    "norm_statistics",
    "spectral_weights",
    "take_windows",
    "update_spectral_norm",
]
