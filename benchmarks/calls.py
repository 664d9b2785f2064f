"""Which calls of operators a configuration's networks make, recorded from the networks themselves.

Nothing about shapes is written down here. The networks are built on the meta device and run once;
every call of a function of `kernels` is kept with the shapes, layouts and dtypes of its arguments,
and can then be made again with random values.

Shapes: B batch, T frames, C channels, H x W pixels.
"""

import inspect
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import kernels
from benchmarks.setups import KINETICS, few_channels
from engine.configuration import Config, config_from_tree, load_config
from engine.models import build_discriminators, build_generator, draw_frame_indices
from engine.models.spectral import divided_one_by_one
from engine.planning.forward_pass import generator_inputs
from kernels import Normalized  # the class, also while calls of it are recorded
from kernels.common.layout import channels_last

Network = Literal["generator", "discriminators"]

PAPER_SAMPLES = ("training.micro_batch=4",)
# Eight channels where the paper has 128 and 96: seconds on a CPU core, shapes of the same kind.
REDUCED = (*few_channels(2, 8), "training.micro_batch=2", "training.precision=fp32")

# What models call: the operator that it is. A norm is not computed by itself there, so it is
# recorded where it is handed on, and a convolution behind one is recorded on the video alone.
RECORDED = {
    "Normalized": "frame_norm",
    "conv2d": "conv2d",
    "conv_gru": "conv_gru",
    "conv_pool2d": "conv_pool2d",
    "conv_pool3d": "conv_pool3d",
    "separable_conv3d": "separable_conv3d",
    "upsample_conv": "upsample_conv",
}


@dataclass(frozen=True)
class Call:
    """One call of `kernels.<operator>`: its arguments by name, tensors on the meta device."""

    operator: str
    arguments: dict[str, Any]

    @property
    def x(self) -> Tensor:
        """The video, every operator's first argument."""
        x: Tensor = next(iter(self.arguments.values()))
        return x

    @property
    def weights(self) -> dict[str, Tensor]:
        """Convolution weights, by argument name; empty for a norm."""
        begin = "weight", "temporal_weight", "spatial_weight"
        return {name: value for name, value in self.arguments.items() if name.startswith(begin)}

    @property
    def constant_input(self) -> bool:
        """Whether x is the same at every time step: the generator's first ConvGRU."""
        return self.x.shape[1] > 1 and self.x.stride(1) == 0

    @property
    def name(self) -> str:
        """`4x12x512x32x32-256` for x [4, 12, 512, 32, 32] and 256 output channels; usable in -k.

        With `-shortcut` where an upsampled shortcut is added.
        """
        parts = ["x".join(map(str, self.x.shape))]
        if self.weights and self.operator != "conv_gru":
            parts.append(str(list(self.weights.values())[-1].shape[0]))
        if isinstance(self.arguments.get("residual_BTOHW"), kernels.UpsampledShortcut):
            parts.append("shortcut")
        return "-".join(parts)

    @property
    def num_bytes(self) -> int:
        """Of the arguments, as they lie in memory."""
        tensors = {id(t): t for t in tree_leaves(self.arguments) if isinstance(t, Tensor)}
        return sum(storage_shape(t).numel() * t.element_size() for t in tensors.values())

    def function(self) -> Callable[..., Tensor]:
        """The operator."""
        found: Callable[..., Tensor] = getattr(kernels, self.operator)
        return found

    def draw(self, device: torch.device, seed: int) -> dict[str, Any]:
        """Random arguments of the same shapes and dtypes.

        Videos are channels last, as everywhere here (the meta device's convolutions do not tell).
        What is the same at every time step stays so. Weights have variance 1 / fan-in, so that
        values stay near 1.
        """
        random = torch.Generator(device).manual_seed(seed)

        def fill(name: str, like: Any) -> Any:
            if not isinstance(like, Tensor):
                return like
            value = torch.randn(storage_shape(like), generator=random, device=device)
            if name in self.weights:
                value /= math.sqrt(like[0].numel())
            value = value.to(like.dtype)
            if like.dim() == 5 and name not in self.weights:
                value = channels_last(value)
            return value.requires_grad_(like.requires_grad).expand(like.shape)

        return {
            name: tree_map(partial(fill, name), value) for name, value in self.arguments.items()
        }


def storage_shape(like: Tensor) -> torch.Size:
    """The shape without what is only repeated (strides of 0)."""
    pairs = zip(like.shape, like.stride(), strict=True)
    return torch.Size(1 if stride == 0 else size for size, stride in pairs)


def in_dtype(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same arguments as leaves of another dtype, sharing nothing, strides of 0 kept."""

    def cast(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        base = leaf.detach().as_strided(storage_shape(leaf), leaf.stride())
        copy = base.to(dtype, copy=True).requires_grad_(leaf.requires_grad)
        return copy.expand(leaf.shape)

    return {name: tree_map(cast, value) for name, value in arguments.items()}


def kinetics(*, reduced: bool) -> Config:
    """configs/kinetics600.yaml with the paper's samples per GPU, or `REDUCED`."""
    return load_config(KINETICS, REDUCED if reduced else PAPER_SAMPLES)


def network_calls(
    config: Config, stage_number: int, operator: str, network: Network = "generator"
) -> list[Call]:
    """The different calls of one operator in a stage's generator or discriminators, in order.

    Calls that differ only in what is added at the end, but for an upsampled shortcut, or in whether
    x changes in time, count as one: that with the most arguments stands for them. 1x1 convolutions
    are left out.
    """

    def rank(call: Call) -> tuple[int, bool]:
        num_tensors = sum(isinstance(leaf, Tensor) for leaf in tree_leaves(call.arguments))
        return num_tensors, not call.constant_input

    found: dict[tuple[Any, ...], Call] = {}
    for call in _recorded(json.dumps(config.to_tree()), stage_number, network):
        shapes = tuple(tuple(weight.shape) for weight in call.weights.values())
        if call.operator != operator or any(shape[1:-1] == (1, 1) for shape in shapes):
            continue
        key = call.name, shapes
        found[key] = max(found.get(key, call), call, key=rank)
    return list(found.values())


@cache
def _recorded(tree: str, stage_number: int, network: Network) -> tuple[Call, ...]:
    """Of one pass at the micro-batch; of the discriminators over reals and fakes together."""
    config = config_from_tree(json.loads(tree), "recorded configuration")
    stage = config.stages[stage_number]
    batch = (1 if network == "generator" else 2) * stage.training.samples_per_pass
    calls: list[Call] = []

    def recording(name: str) -> Callable[..., Any]:
        original = getattr(kernels, name)
        signature = inspect.signature(original)

        def call(*args: Any, **kwargs: Any) -> Any:
            arguments = dict(signature.bind(*args, **kwargs).arguments)
            calls.append(Call(RECORDED[name], _on_videos(name, arguments)))
            return original(*args, **kwargs)

        return call

    replaced: dict[str, Any] = {name: recording(name) for name in RECORDED}
    # Operators fold weights themselves in these benchmarks: none comes folded already.
    with mock.patch.multiple(kernels, **replaced), divided_one_by_one(), torch.device("meta"):
        if network == "generator":
            generator = build_generator(config, stage_number)
            generator(*generator_inputs(config, stage_number, batch, generator.latent_size))
        else:
            video = torch.empty(batch, stage.num_frames, 3, stage.resolution, stage.resolution)
            _, labels, low = generator_inputs(config, stage_number, batch, 1)
            num_drawn = stage.discriminators.spatial_frames
            frames = draw_frame_indices(batch, stage.num_frames, num_drawn).to(video.device)
            windows = low if isinstance(low, Tensor) else None
            build_discriminators(config, stage_number)(video, labels, windows, frames)
    return tuple(calls)


def _on_videos(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments as the operator takes them: a norm its video, a convolution the norm's."""
    if name == "Normalized":
        return {"x_BTCHW": arguments["video"], "gain": arguments["gain"], "bias": arguments["bias"]}
    return {
        key: value.video if isinstance(value, Normalized) else value
        for key, value in arguments.items()
        if key != "only_graph"  # of passes that are made again
    }
