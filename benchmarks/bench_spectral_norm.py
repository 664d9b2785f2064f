"""Spectral norm of all weights of stage 2's generator, beside torch's own parametrization."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from benchmarks.calls import kinetics
from benchmarks.correctness import check
from benchmarks.floors import spectral_cost
from benchmarks.launches import parametrized, parametrized_weight
from benchmarks.operators import OURS, REFERENCE, Case
from benchmarks.session import Session
from engine.models import build_generator
from engine.models.construction import compute_dtype
from engine.models.layers import spectral_weights

PARAMETRIZATION = "parametrizations"


@dataclass
class Weights:
    """A network's weights, each with its vectors and an upstream gradient of Ŵ."""

    weights: list[Tensor]
    us: list[Tensor]
    vs: list[Tensor]
    upstream: list[Tensor]

    def copy(self, dtype: torch.dtype | None = None) -> "Weights":
        """Sharing nothing; weights and vectors in `dtype` if that is given."""

        def cast(tensors: list[Tensor]) -> list[Tensor]:
            return [t.detach().to(dtype or t.dtype, copy=True) for t in tensors]

        weights = [weight.requires_grad_() for weight in cast(self.weights)]
        upstream = self.upstream if dtype is None else cast(self.upstream)
        return Weights(weights, cast(self.us), cast(self.vs), upstream)


def draw(shapes: Sequence[torch.Size], dtype: torch.dtype, device: torch.device) -> Weights:
    """Gaussian weights of standard deviation 0.02, and unit vectors."""
    random = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=device)

    def units(lengths: list[int]) -> list[Tensor]:
        return [torch.nn.functional.normalize(randn(length), dim=0) for length in lengths]

    return Weights(
        weights=[(0.02 * randn(*shape)).requires_grad_() for shape in shapes],
        us=units([shape[0] for shape in shapes]),
        vs=units([shape[1:].numel() for shape in shapes]),
        upstream=[randn(*shape).to(dtype) for shape in shapes],
    )


def iterate(weights: Weights) -> list[Tensor]:
    """One power iteration; σ of every weight."""
    return [kernels.power_iteration_(weights.weights, weights.us, weights.vs)]


def normalize(weights: Weights) -> list[Tensor]:
    """Ŵ of every weight, in the dtype of its upstream gradient."""
    dtypes = [upstream.dtype for upstream in weights.upstream]
    unfolded = [None] * len(dtypes)
    return kernels.spectral_normalize_all(weights.weights, weights.us, weights.vs, dtypes, unfolded)


def gradients(weights: Weights) -> Sequence[Tensor]:
    """Ŵ, then dW of every weight."""
    return torch.autograd.grad(normalize(weights), weights.weights, weights.upstream)


def results(weights: Weights, setting: str) -> dict[str, Tensor]:
    """σ, u, v, Ŵ and dW of all weights, each quantity flattened into one tensor."""
    with kernels.use(setting):
        named = {"sigma": iterate(weights), "u": weights.us, "v": weights.vs}
        named |= {"weight": normalize(weights), "dweight": list(gradients(weights))}
    return {k: torch.cat([t.detach().flatten() for t in v]) for k, v in named.items()}


def check_weights(weights: Weights) -> None:
    """Ours against the reference in fp64. Raises Refused."""
    truth = results(weights.copy(torch.float64), "reference")
    usual, got = (results(weights.copy(), setting) for setting in ("reference", "auto"))
    num_terms = max(w.numel() for w in weights.weights)  # of ⟨dŴ, W⟩
    check(OURS, got, usual, truth, num_terms)


STEPS: dict[str, tuple[Callable[[Weights], object], ...]] = {
    "iteration": (iterate,),
    "iteration_forward": (iterate, normalize),
    "iteration_forward_backward": (iterate, gradients),
}


def make_sides(weights: Weights, direction: str) -> dict[str, Callable[[], object]]:
    """Ours, the reference, and torch's, which always iterates and normalises together."""

    def run(setting: str, own: Weights) -> None:
        with kernels.use(setting):
            for step in STEPS[direction]:
                step(own)

    sides: dict[str, Callable[[], object]] = {
        OURS: partial(run, "auto", weights.copy()),
        REFERENCE: partial(run, "reference", weights.copy()),
    }
    if direction == "iteration":
        return sides
    modules = [parametrized(weight) for weight in weights.weights]
    upstream = [up.flatten(1).float() for up in weights.upstream]

    def parametrizations() -> object:
        if direction == "iteration_forward":
            with torch.no_grad():
                return [parametrized_weight(module) for module in modules]
        originals = [next(module.parameters()) for module in modules]
        normalized = [parametrized_weight(module) for module in modules]
        return torch.autograd.grad(normalized, originals, upstream)

    return sides | {PARAMETRIZATION: parametrizations}


@pytest.mark.parametrize("steps", STEPS)
def test_spectral_norm(session: Session, benchmark: Any, steps: str) -> None:
    """Once per optimiser step; Ŵ once per forward pass. Kept apart they cost their difference."""
    if session.quick and steps != "iteration_forward_backward":
        pytest.skip("--quick measures everything together only")
    config = kinetics(reduced=session.device.type != "cuda")
    with torch.device("meta"):
        layers = spectral_weights(build_generator(config, 2))
    dtype = compute_dtype(config.stages[2])
    weights = draw([layer.weight.shape for layer in layers], dtype, session.device)
    num_values = sum(weight.numel() for weight in weights.weights)
    case = Case(
        operator="spectral_norm",
        shape=f"{len(layers)} weights of {num_values / 1e6:.1f} M",
        direction=steps,
        dtype=dtype,
        cost=spectral_cost(
            num_values,
            dtype.itemsize,
            normalize=steps != "iteration",
            backward=steps.endswith("backward"),
        ),
        check=partial(check_weights, weights),
        sides=partial(make_sides, weights, steps),
    )
    session.run(case, benchmark)
