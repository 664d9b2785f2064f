"""What is timed was compared before: an operator with its reference, whole networks with others.

An operator's y and every gradient are compared with the reference's in fp64. Their largest error
may be twice that of the reference in the same dtype, plus a floor for where the reference is lucky,
plain rounding of the largest value: one rounding to the result's dtype, and √K roundings of fp32,
the standard deviation of a sum of K terms with independent errors.

Networks are compared in values and gradients of one G loss and one D loss, as the training step has
them: G's video, D's scores, and the gradient of every parameter.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks.calls import Call, in_dtype, storage_shape
from engine.configuration import Config
from engine.models.construction import compute_dtype
from engine.models.discriminators import draw_frame_indices
from engine.trainer.deepspeed_engines import frozen
from engine.trainer.losses import discriminator_hinge, generator_hinge
from engine.trainer.step import Trainer

Function = Callable[..., Tensor]
Results = dict[str, Tensor]


class Refused(AssertionError):  # noqa: N818 - what happened, not what went wrong
    """Results are wrong, so their time says nothing."""


def passes_once(check: Callable[[int], None], seeds: Iterable[int]) -> None:
    """Draw anew while a check is refused. Raises the last seed's Refused.

    Among a million values one may be so close to a ReLU's kink that rounding decides; the gradient
    then jumps, and no error bound holds. What is wrong is wrong every time.
    """
    *first, last = seeds
    for seed in first:
        try:
            return check(seed)
        except Refused:
            pass
    check(last)


# ----------------------------------------------------------------------------------- operators


def check_call(call: Call, sides: Mapping[str, Function], reference: Function, device: Any) -> None:
    """Compare every side's y and gradients at this call. Raises Refused."""

    def check_drawn(seed: int) -> None:
        arguments = call.draw(device, seed)
        wide = in_dtype(arguments, torch.float64)
        with torch.no_grad():
            y = reference(**wide)
        random = torch.Generator(y.device).manual_seed(seed)
        dy = torch.randn(y.shape, generator=random, device=y.device).to(call.x.dtype)
        if call.operator == "frame_norm":
            # Where rounding decides on which side of its ReLU a value is: eight roundings of fp32
            # of the largest value, as in tests/kernels/test_frame_norm_forms.py.
            negated = wide | {name: -wide[name] for name in ("gain", "bias")}
            with torch.no_grad():
                size = y + reference(**negated)  # |v| = relu(v) + relu(-v)
            dy = dy.masked_fill(size < 8 * 2**-24 * size.max(), 0)
        truth = results(reference, wide, dy.double())
        usual = results(reference, arguments, dy)
        pixels = call.x.numel() // call.x.shape[2]
        num_terms = max([pixels, *(weight[0].numel() for weight in call.weights.values())])
        for name, function in sides.items():
            check(name, results(function, arguments, dy), usual, truth, num_terms)

    # A ConvGRU's ReLU is inside, where nobody can keep dy away from its kink.
    passes_once(check_drawn, (1, 2, 3) if call.operator == "conv_gru" else (1,))


def check(side: str, got: Results, usual: Results, truth: Results, num_terms: int) -> None:
    """Errors of `got` against `truth`, beside those of `usual`. Raises Refused, naming the worst.

    `num_terms` is K, the longest sum in any of the results.
    """
    if got.keys() != truth.keys():
        raise Refused(f"{side} returns {sorted(got)}, the reference {sorted(truth)}")
    for name, exact in truth.items():
        rounding = torch.finfo(got[name].dtype).eps / 2
        floor = (rounding + math.sqrt(num_terms) * 2**-24) * exact.abs().max().item()
        error, expected = ((v[name].double() - exact).abs().max().item() for v in (got, usual))
        if not error <= 2 * expected + floor:  # NaN is refused too
            raise Refused(
                f"{side}: {name} errs by {error:.3g}, the reference by {expected:.3g}; "
                f"allowed are twice that and {floor:.3g}"
            )


def results(function: Function, arguments: dict[str, Any], dy: Tensor) -> Results:
    """y, and the gradient of every argument that wants one."""
    y = function(**arguments)
    grads = gradients(y, arguments, dy)
    return {"y": y.detach()} | {f"d{name}": grad for name, grad in grads.items()}


def gradients(y: Tensor, arguments: Mapping[str, Any], dy: Tensor | None = None) -> Results:
    """Of every argument that wants one, also within tuples, by name.

    They are summed over what is only repeated (stride 0).
    """
    inputs = {
        f"{name}.{number}" if isinstance(value, tuple) else name: leaf
        for name, value in arguments.items()
        for number, leaf in enumerate(tree_leaves(value))
        if isinstance(leaf, Tensor) and leaf.requires_grad
    }
    grads = torch.autograd.grad(y, list(inputs.values()), dy)
    return {
        name: grad.sum_to_size(storage_shape(leaf))
        for (name, leaf), grad in zip(inputs.items(), grads, strict=True)
    }


# ------------------------------------------------------------------------------------ networks


def check_networks(
    trainer: Trainer, config: Config, others: Callable[[], AbstractContextManager[None]]
) -> None:
    """The networks must compute the same within `others()` as outside. Raises Refused.

    How far rounding errors grow in a network is measured: by a random change of every weight that
    is as large as they are, one rounding to the dtype computed in and √K of fp32, in which K terms
    are summed. Two implementations err independently, hence twice that. Where rounding takes a
    ReLU's argument across its kink, a jump may be larger than those that the change made.
    """
    networks = trainer.g_engine.module, trainer.d_engine.module
    weights = [p for network in networks for p in network.parameters()]
    stage = config.stages[trainer.stage_number]
    rounding = torch.finfo(compute_dtype(stage)).eps / 2
    fan_in = max(weight[0].numel() for weight in weights)
    pixels = 2 * stage.training.samples_per_pass * stage.num_frames * stage.resolution**2
    forward, backward = (rounding + math.sqrt(n) * 2**-24 for n in (fan_in, max(fan_in, pixels)))

    def check_drawn(seed: int) -> None:
        got = network_results(trainer, config, seed)
        # With u and v, which plain operators iterate in every pass.
        kept = [{k: v.clone() for k, v in network.state_dict().items()} for network in networks]
        random = torch.Generator(weights[0].device).manual_seed(seed)
        with others():
            usual = network_results(trainer, config, seed)
            with torch.no_grad():
                for weight in weights:
                    drawn = torch.rand(weight.shape, generator=random, device=weight.device)
                    weight.mul_(1 + forward * (2 * drawn - 1))
            moved = network_results(trainer, config, seed)
        for network, state in zip(networks, kept, strict=True):
            network.load_state_dict(state)
        video, scores, *grads = zip(got, usual, moved, strict=True)
        for compared in (video, scores):
            _compare(*compared, own=forward, cancelled=0, order=math.inf)
        for compared in grads:
            _compare(*compared, own=backward, cancelled=forward, order=2)

    passes_once(check_drawn, seeds=(3, 4, 5))


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


def network_results(trainer: Trainer, config: Config, seed: int) -> list[Results]:
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

    def parameters(name: str, network: nn.Module) -> dict[str, Tensor]:
        return {f"{name}'s gradients of {k}": p for k, p in network.named_parameters()}

    video = generator(z, labels_G, stage.num_frames if low is None else low_G)
    with frozen(discriminators):
        loss_G = generator_hinge(discriminators(video, labels_G, low_G, frames_G).all)
        gradients_G = gradients(loss_G, parameters("G", generator))
    video = video.detach()
    scores = discriminators(torch.cat([real, video]), *condition).all
    loss_D = discriminator_hinge(*scores.chunk(2))
    gradients_D = gradients(loss_D, parameters("D", discriminators))
    return [{"G's video": video}, {"D's scores": scores.detach()}, gradients_G, gradients_D]
