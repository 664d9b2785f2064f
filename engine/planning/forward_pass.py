"""One forward pass of a stage's networks: its FLOPs, and the bytes it keeps for the backward pass.

Both are counted for one sample on the meta device. `meta_step` counts a whole training step.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import kernels
import kernels.flop_formulas  # our own operators, for the counter
from engine.batches import num_generations
from engine.configuration import Config
from engine.models import build_discriminators, build_generator, draw_frame_indices
from engine.models.cascade import GeneratorCascade
from engine.models.norms import frame_norms
from engine.models.operators import hand_operators


class Forward(NamedTuple):
    """GFLOP of one forward pass of one sample; two per multiply-add."""

    generator: float
    spatial: float
    temporal: float
    matching: float

    @property
    def step(self) -> float:
        """TFLOP per sample of two D updates and one G update.

        A backward pass costs twice its forward. D update: G forward, D forward and backward on
        real and fake. G update: G forward and backward, D forward and, for its input only, back.
        """
        discriminators = self.spatial + self.temporal + self.matching
        d_update = self.generator + 2 * 3 * discriminators
        g_update = 3 * self.generator + 2 * discriminators
        return (2 * d_update + g_update) / 1e3


def count_forward(config: Config, stage_number: int) -> Forward:
    """Count a stage's networks at their full size."""
    stage = config.stages[stage_number]
    with torch.device("meta"):
        generator = build_generator(config, stage_number)
        discriminators = build_discriminators(config, stage_number)
        z, labels, low_or_length = generator_inputs(config, stage_number, 1, generator.latent_size)
        video = torch.empty(1, stage.num_frames, 3, stage.resolution, stage.resolution)
        frames = draw_frame_indices(1, stage.num_frames, stage.discriminators.spatial_frames)
        matching = discriminators.matching
        return Forward(
            _gigaflops(generator, z, labels, low_or_length),
            _gigaflops(discriminators.spatial, video, labels, frames.to("meta")),
            _gigaflops(discriminators.temporal, video, labels),
            0.0 if matching is None else _gigaflops(matching, video, labels, low_or_length),
        )


def count_frozen(config: Config, stage_number: int) -> float:
    """TFLOP per sample and step that the frozen stages before this one add to its own.

    Without a bank they make each window that G upsamples, and no more of a video than that takes.
    A bank's videos are whole, and all replaced once in `refresh_every` steps.
    """
    training = config.stages[stage_number].training
    bank = training.sample_bank
    with torch.device("meta"):
        cascade = frozen_stages(config, stage_number)
        sizes = [config.stages[n].generator.latent_size for n in range(1, stage_number)]
        zs = [torch.empty(1, size) for size in sizes]
        labels = torch.empty(1, dtype=torch.long) if config.data.num_classes else None
    sample = cascade.sample_window if bank is None else cascade.sample_previous
    teraflops = _gigaflops(sample, stage_number, zs, labels, torch.Generator()) / 1e3
    if bank is None:
        return num_generations(training) * teraflops
    return bank.num_videos / bank.refresh_every / training.global_batch * teraflops


def frozen_stages(config: Config, stage_number: int, operators: Any = kernels) -> GeneratorCascade:
    """The stages before this one as its training has them, with arbitrary norm statistics fixed."""
    generators = [build_generator(config, n) for n in range(1, stage_number)]
    for n, generator in enumerate(generators, start=1):
        num_frames = config.stages[n].num_frames
        for norm in frame_norms(generator).values():
            channels = norm.gain.normalized.u.numel()
            norm.fix((torch.zeros(num_frames, channels), torch.ones(num_frames, channels)))
        hand_operators(generator, operators)
    return GeneratorCascade(generators, config).freeze()


def generator_inputs(
    config: Config, stage_number: int, batch: int, latent_size: int
) -> tuple[Tensor, Tensor | None, Tensor | int]:
    """A generator's arguments on the current device: z, labels, and x_l or the clip's length."""
    z = torch.empty(batch, latent_size)
    labels = torch.empty(batch, dtype=torch.long) if config.data.num_classes else None
    if stage_number == 1:
        return z, labels, config.stages[1].num_frames
    window = config.upsampling(stage_number)
    return z, labels, torch.empty(batch, window.num_frames, 3, *2 * (window.resolution,))


def _gigaflops(network: Callable[..., Tensor], *args: Any) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        result = network(*args)
    assert result.is_meta
    assert math.prod(result.shape) > 0
    return counter.get_total_flops() / 1e9


def saved_for_backward(forward: Callable[[int], object], batches: tuple[int, int] = (1, 2)) -> int:
    """Bytes per sample that a forward pass keeps for its backward pass.

    `forward(batch)` runs it once with gradients, on the meta device or any other. Counted are the
    storages of all tensors that autograd saves, each once: the more of them for the larger batch.
    So parameters, buffers and whatever else does not depend on the batch cancel. What a function
    keeps as a plain attribute of its context is not seen. Raises ValueError where the difference
    is not a whole number of bytes per sample.
    """
    fewer, more = batches
    difference = _saved_bytes(forward, more) - _saved_bytes(forward, fewer)
    if fewer >= more or difference % (more - fewer):
        raise ValueError(f"{difference} bytes more for batches {batches} are not so many a sample")
    return difference // (more - fewer)


def _saved_bytes(forward: Callable[[int], object], batch: int) -> int:
    # Kept alive until all are counted: a freed storage's address is given out again.
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward(batch)
    total = sum(storage.nbytes() for storage in storages.values())
    del result  # not before: the graph holds what was saved
    return total


def generator_saved_for_backward(config: Config, stage_number: int) -> int:
    """Bytes per sample that a stage's generator keeps, in the configuration's precision."""
    with torch.device("meta"):
        generator = build_generator(config, stage_number)

        def forward(batch: int) -> Tensor:
            inputs = generator_inputs(config, stage_number, batch, generator.latent_size)
            result: Tensor = generator(*inputs)
            return result

        return saved_for_backward(forward)
