"""Whole networks in two forms must compute the same before either is timed."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from benchmarks.correctness import Refused
from engine.configuration import Config
from engine.models.construction import compute_dtype
from engine.models.discriminators import draw_frame_indices
from engine.trainer.step import Trainer


def outputs(trainer: Trainer, config: Config) -> dict[str, Tensor]:
    """G's video and D's scores of it, for inputs that are the same in every call."""
    number, stage = trainer.stage_number, config.stages[trainer.stage_number]
    device, batch = trainer.g_engine.device, stage.training.micro_batch
    random = torch.Generator().manual_seed(3)
    z = torch.randn(batch, stage.generator.latent_size, generator=random).to(device)
    low = None
    if number > 1:
        window = config.upsampling(number)
        size = window.num_frames, 3, window.resolution, window.resolution
        low = torch.rand(batch, *size, generator=random).to(device)
    classes = config.data.num_classes
    labels = None if classes is None else torch.arange(batch, device=device) % classes
    frames = draw_frame_indices(
        batch, stage.num_frames, stage.discriminators.spatial_frames, random
    ).to(device)
    with torch.no_grad():
        video = trainer.g_engine.module(z, labels, stage.num_frames if low is None else low)
        scores = trainer.d_engine.module(video, labels, low, frames).all
    return {"G's video": video, "D's scores": scores}


def check_networks(
    trainer: Trainer, config: Config, other_form: Callable[[], AbstractContextManager[None]]
) -> None:
    """The networks must compute the same within `other_form` as outside. Raises Refused.

    How far rounding errors grow in a network is measured: by one random rounding of every weight.
    A sum of K terms makes √K of them, and two forms err independently, hence 2·√K times that.
    """
    got = outputs(trainer, config)
    with other_form():
        usual = outputs(trainer, config)
    networks = trainer.g_engine.module, trainer.d_engine.module
    weights = [p for network in networks for p in network.parameters()]
    rounding = torch.finfo(compute_dtype(config.stages[trainer.stage_number])).eps / 2
    kept = [weight.detach().clone() for weight in weights]
    with torch.no_grad(), other_form():
        for weight in weights:
            weight.mul_(1 + rounding * (2 * torch.rand_like(weight) - 1))
        moved = outputs(trainer, config)
        for weight, before in zip(weights, kept, strict=True):
            weight.copy_(before)
    num_terms = max(weight[0].numel() for weight in weights)
    for name, value in usual.items():
        difference, response = (_distance(v[name], value) for v in (got, moved))
        if not difference <= 2 * math.sqrt(num_terms) * response:
            raise Refused(
                f"{name} differ by {difference:.3g}; one rounding of every weight moves them by "
                f"{response:.3g}"
            )


def _distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()
