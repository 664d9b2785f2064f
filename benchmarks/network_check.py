"""Whole networks in two forms must compute the same before either is timed: values and gradients.

Of one G loss and one D loss, as the training step has them: G's video, D's scores, and the gradient
of every parameter.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from benchmarks.correctness import Refused, Results
from engine.configuration import Config
from engine.models.construction import compute_dtype
from engine.models.discriminators import draw_frame_indices
from engine.trainer.deepspeed_engines import frozen
from engine.trainer.losses import discriminator_hinge, generator_hinge
from engine.trainer.step import Trainer

NUM_DRAWS = 3


def results(trainer: Trainer, config: Config, seed: int) -> list[Results]:
    """G's video; D's scores of reals, then of that video; the gradients of G; those of D."""
    number, stage = trainer.stage_number, config.stages[trainer.stage_number]
    generator, discriminators = trainer.g_engine.module, trainer.d_engine.module
    device, batch = trainer.g_engine.device, stage.training.samples_per_pass
    random = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, stage.generator.latent_size, generator=random).to(device)

    def draw(batch: int, num_frames: int, resolution: int) -> Tensor:
        size = batch, num_frames, 3, resolution, resolution
        return (2 * torch.rand(size, generator=random) - 1).to(device)

    real, low = draw(batch, stage.num_frames, stage.resolution), None
    if number > 1:
        window = config.upsampling(number)
        low = draw(2 * batch, window.num_frames, window.resolution)
    classes = config.data.num_classes
    labels = None if classes is None else torch.arange(2 * batch, device=device) % classes
    frames = draw_frame_indices(
        2 * batch, stage.num_frames, stage.discriminators.spatial_frames, random
    ).to(device)
    condition = labels, low, frames
    labels_G, low_G, frames_G = (None if c is None else c[batch:] for c in condition)

    video = generator(z, labels_G, stage.num_frames if low is None else low_G)
    with frozen(discriminators):
        loss_G = generator_hinge(discriminators(video, labels_G, low_G, frames_G).all)
        gradients_G = _gradients("G", generator, loss_G)
    video = video.detach()
    scores = discriminators(torch.cat([real, video]), *condition).all
    gradients_D = _gradients("D", discriminators, discriminator_hinge(*scores.chunk(2)))
    return [{"G's video": video}, {"D's scores": scores.detach()}, gradients_G, gradients_D]


def check_networks(
    trainer: Trainer, config: Config, other_form: Callable[[], AbstractContextManager[None]]
) -> None:
    """The networks must compute the same within `other_form` as outside. Raises Refused.

    How far rounding errors grow in a network is measured: by a random change of every weight that
    is as large as they are, one rounding to the dtype computed in and √K of fp32, in which K terms
    are summed. Two forms err independently, hence twice that. A gradient also jumps where rounding
    takes a ReLU's argument across its kink, and one such jump may be larger than those that the
    change made; then everything is drawn anew, twice. What is wrong is wrong every time.
    """
    for draw in range(NUM_DRAWS):
        try:
            _check_drawn(trainer, config, other_form, seed=3 + draw)
            return
        except Refused:
            if draw == NUM_DRAWS - 1:
                raise


def _check_drawn(
    trainer: Trainer,
    config: Config,
    other_form: Callable[[], AbstractContextManager[None]],
    seed: int,
) -> None:
    networks = trainer.g_engine.module, trainer.d_engine.module
    weights = [p for network in networks for p in network.parameters()]
    stage = config.stages[trainer.stage_number]
    rounding = torch.finfo(compute_dtype(stage)).eps / 2
    fan_in = max(weight[0].numel() for weight in weights)
    pixels = 2 * stage.training.samples_per_pass * stage.num_frames * stage.resolution**2
    forward, backward = (rounding + math.sqrt(n) * 2**-24 for n in (fan_in, max(fan_in, pixels)))

    got = results(trainer, config, seed)
    # With u and v, which plain operators iterate in every pass.
    kept = [{k: v.clone() for k, v in network.state_dict().items()} for network in networks]
    random = torch.Generator(weights[0].device).manual_seed(seed)
    with other_form():
        usual = results(trainer, config, seed)
        with torch.no_grad():
            for weight in weights:
                drawn = torch.rand(weight.shape, generator=random, device=weight.device)
                weight.mul_(1 + forward * (2 * drawn - 1))
        moved = results(trainer, config, seed)
    for network, state in zip(networks, kept, strict=True):
        network.load_state_dict(state)
    video, scores, *gradients = zip(got, usual, moved, strict=True)
    for compared in (video, scores):
        _compare(*compared, own=forward, cancelled=0, order=math.inf)
    for compared in gradients:
        _compare(*compared, own=backward, cancelled=forward, order=2)


def _compare(
    got: Results, usual: Results, moved: Results, own: float, cancelled: float, order: float
) -> None:
    """Tensors that a change moves alike, in the norm of an order.

    The one that it moves most speaks for all. Floors are `own` roundings of a tensor's size, and
    `cancelled` ones of the largest's, for the gradient of a bias in front of a norm: it is zero but
    for what cancels.
    """

    def norm(tensor: Tensor) -> float:
        return torch.linalg.vector_norm(tensor.double(), order).item()

    sizes = {name: norm(value) for name, value in usual.items()}
    floor = cancelled * max(sizes.values())
    response = 0.0
    for name, value in usual.items():
        move = norm(moved[name] - value) - floor
        response = max(response, move / sizes[name] if move > 0 else 0)
    for name, value in usual.items():
        allowed = (2 * response + own) * sizes[name] + floor
        difference = norm(got[name] - value)
        if not difference <= allowed:  # NaN is refused too
            raise Refused(
                f"{name} differ by {difference:.3g} of {sizes[name]:.3g}; rounding every weight "
                f"moves by {response:.3g} of it, allowed are {allowed:.3g}"
            )


def _gradients(network: str, module: nn.Module, loss: Tensor) -> Results:
    named = dict(module.named_parameters())
    gradients = torch.autograd.grad(loss, list(named.values()))
    return {f"{network}'s gradients of {k}": g for k, g in zip(named, gradients, strict=True)}
