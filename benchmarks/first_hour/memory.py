"""The planner's peak of memory beside the allocator's, of whole iterations, DeepSpeed included."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.first_hour.iterations import DEFAULT_SETUPS, CurrentIterations
from benchmarks.first_hour.parts import Part
from benchmarks.first_hour.scale import Scale
from benchmarks.setups import BUILDS, config_of
from benchmarks.whole_step import free_memory
from engine.planning.meta_step import run_step
from engine.planning.rank_memory import Scaling, find_peak

MODES = ("ours", "blocks")
"""Builds that differ in what they make again."""


def parts(scale: Scale, names: tuple[str, ...]) -> Iterator[Part]:
    """The prediction is counted where there is no GPU too."""
    current = CurrentIterations(scale)
    for setup in names or DEFAULT_SETUPS:
        for build in MODES:
            for samples in scale.samples:
                name = f"{setup}, {build}, {samples} samples"
                yield Part(name, partial(compare, scale, current, setup, build, samples))


def compare(
    scale: Scale, current: CurrentIterations, setup: str, build: str, samples: int
) -> dict[str, Any]:
    """Bytes of tensors at most, predicted and allocated."""
    scale.require_gpu()
    chosen, device = current.setup(setup), scale.device
    config = config_of(chosen, BUILDS[build], samples, scale.overrides(chosen.number))
    training = config.stages[chosen.number].training
    one_gpu = Scaling(training.zero_stage, num_ranks=1, accumulates=False)
    predicted = find_peak(run_step(config, chosen.number), training, one_gpu).total
    iteration = current.of(setup, build).at(samples)
    iteration()  # kernels are compiled, the optimizer's state is there
    free_memory()
    torch.cuda.reset_peak_memory_stats(device)
    iteration()
    torch.cuda.synchronize(device)
    measured = torch.cuda.max_memory_allocated(device)
    return {
        "predicted_bytes": predicted,
        "allocated_bytes": measured,
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
        "predicted_over_allocated": predicted / measured,
    }
