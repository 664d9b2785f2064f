"""What a training step executes, launches and keeps, counted on the meta device.

Nothing is run: these hold on any machine, and tests hold them. FLOPs are two per multiply-add.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import kernels
from engine.configuration import Config
from engine.models import build_discriminators, build_generator, draw_frame_indices
from engine.models.layers import SpectralWeight, spectral_weights

# ---------------------------------------------------------------------------------- FLOPs


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

    Without a bank they make a video for each window that G upsamples, one per D update and one
    for G's. A bank's videos are all replaced once in `refresh_every` steps.
    """
    training = config.stages[stage_number].training
    gigaflops = sum(_generator_gigaflops(config, number) for number in range(1, stage_number))
    bank = training.sample_bank
    if bank is None:
        return (training.discriminator_steps + 1) * gigaflops / 1e3
    return bank.num_videos / bank.refresh_every / training.global_batch * gigaflops / 1e3


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


def _generator_gigaflops(config: Config, stage_number: int) -> float:
    with torch.device("meta"):
        generator = build_generator(config, stage_number)
        return _gigaflops(
            generator, *generator_inputs(config, stage_number, 1, generator.latent_size)
        )


def _gigaflops(network: nn.Module, *args: Any) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        result: Tensor = network(*args)
    assert result.is_meta
    assert math.prod(result.shape) > 0
    return counter.get_total_flops() / 1e9


# ------------------------------------------------------------------------------- launches

# What one call of an operator of ours launches on a GPU; see the launchers in kernels/.
LAUNCHES = {
    "sswgan::power_iteration_": 4,
    "sswgan::spectral_normalize": 2,
    "sswgan::spectral_normalize_dw": 2,
    "sswgan::spectral_normalize_all": 2,
    "sswgan::spectral_normalize_all_dw": 2,
}

# Operators that only describe memory anew, or allocate it.
_WITHOUT_LAUNCH = {
    *("_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like"),
    *("empty_strided", "expand", "flatten", "new_empty", "permute", "reshape", "select", "slice"),
    *("split", "squeeze", "t", "transpose", "unsqueeze", "view"),
}


class LaunchCounter(TorchDispatchMode):
    """Counts launches: each of PyTorch's operators that computes is one at least, ours `LAUNCHES`.

    Raises KeyError for an operator of ours that is not in the table.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count, then run."""
        self.calls[func._schema.name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def launches(self) -> int:
        """So far."""
        return sum(count * _launches_of(name) for name, count in self.calls.items())


def _launches_of(name: str) -> int:
    namespace, operator = name.split("::")
    if namespace == "aten":
        return int(operator not in _WITHOUT_LAUNCH)
    if name not in LAUNCHES:
        raise KeyError(f"benchmarks/accounting.py: LAUNCHES does not say what {name} launches")
    return LAUNCHES[name]


class SpectralLaunches(NamedTuple):
    """Launches of one network's spectral norm, all weights together."""

    iteration: int
    """One power iteration, which also gives the singular values."""
    forward: int
    """Ŵ of every weight."""
    backward: int
    """dW of every weight."""


def count_spectral_launches(network: nn.Module, impl: str) -> SpectralLaunches:
    """Of a network on the meta device, in bf16. `impl` as the operators' own: "triton", ..."""
    layers = spectral_weights(network)
    with LaunchCounter() as iteration:
        kernels.power_iteration_(*_lists(layers), impl=impl)
    with LaunchCounter() as forward:
        dtypes = [torch.bfloat16 for _ in layers]
        folds = [layer.fold for layer in layers]
        normalized = kernels.spectral_normalize_all(*_lists(layers), dtypes, folds, impl=impl)
    upstream = [torch.empty_like(weight) for weight in normalized]
    with LaunchCounter() as backward:
        torch.autograd.grad(normalized, [layer.weight for layer in layers], upstream)
    return SpectralLaunches(iteration.launches, forward.launches, backward.launches)


def count_parametrization_launches(network: nn.Module) -> int:
    """Forward pass of torch's own spectral norm (iteration and Ŵ, fp32) for the same weights.

    Counted for one weight, because it does the same to every matrix.
    """
    layers = spectral_weights(network)
    module = parametrized(layers[0].weight)
    with LaunchCounter() as counter:
        parametrized_weight(module)
    return counter.launches * len(layers)


def parametrized(weight: Tensor) -> nn.Module:
    """A module whose `.weight` is torch's spectral norm of a copy of this one, read as a matrix."""
    module = nn.Module()
    module.weight = nn.Parameter(weight.detach().flatten(1).clone())
    return nn.utils.parametrizations.spectral_norm(module, n_power_iterations=1)


def parametrized_weight(module: nn.Module) -> Tensor:
    """One power iteration, then W over its largest singular value."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _lists(layers: list[SpectralWeight]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return (
        [layer.weight for layer in layers],
        [layer.u for layer in layers],
        [layer.v for layer in layers],
    )


# --------------------------------------------------------------------- saved for backward


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
