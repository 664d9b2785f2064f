"""Spectral norm of all weights of stage 2's generator, beside torch's own parametrization."""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import kernels
from benchmarks.calls import kinetics
from benchmarks.correctness import Results, check
from benchmarks.floors import spectral_cost
from benchmarks.launches import parametrized, parametrized_weight
from benchmarks.operators import COMPILED, OURS, REFERENCE, Case
from benchmarks.session import Session
from benchmarks.timing import cache_bytes, num_copies
from engine.models import build_generator
from engine.models.construction import compute_dtype
from engine.models.spectral import spectral_weights

PARAMETRIZATION = "parametrizations"
DIRECTIONS = ("iteration", "iteration_forward", "iteration_forward_backward")


@dataclass
class Weights:
    """A network's weights, each with its vectors and an upstream gradient of Ŵ."""

    weights: list[Tensor]
    us: list[Tensor]
    vs: list[Tensor]
    upstream: list[Tensor]

    def copy(self, dtype: torch.dtype | None = None) -> "Weights":
        """Sharing nothing; in `dtype` if that is given."""

        def cast(tensors: list[Tensor]) -> list[Tensor]:
            return [t.detach().to(dtype or t.dtype, copy=True) for t in tensors]

        weights = [weight.requires_grad_() for weight in cast(self.weights)]
        return Weights(weights, cast(self.us), cast(self.vs), cast(self.upstream))


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


class Form(NamedTuple):
    """How a side's two operators run."""

    setting: str
    iterate: Callable[[Weights], list[Tensor]] = iterate
    normalize: Callable[[Weights], list[Tensor]] = normalize

    def run(self, weights: Weights, direction: str) -> None:
        """What is timed."""
        with kernels.use(self.setting):
            self.iterate(weights)
            if direction == "iteration_forward":
                with torch.no_grad():
                    self.normalize(weights)
            elif direction == "iteration_forward_backward":
                torch.autograd.grad(self.normalize(weights), weights.weights, weights.upstream)

    def results(self, weights: Weights) -> Results:
        """σ, u, v, Ŵ and dW of all weights."""
        with kernels.use(self.setting):
            named = {"sigma": self.iterate(weights), "u": weights.us, "v": weights.vs}
            normalized = self.normalize(weights)
            dweights = torch.autograd.grad(normalized, weights.weights, weights.upstream)
        return _flat(named | {"weight": normalized, "dweight": list(dweights)})


def forms(*, compiled: bool) -> dict[str, Form]:
    """The sides that run this project's operators."""
    found = {OURS: Form("auto"), REFERENCE: Form("reference")}
    return found | {COMPILED: _compiled()} if compiled else found


@functools.cache
def _compiled() -> Form:
    """Once for all cases: a graph of so many weights compiles for many minutes."""
    both = (torch.compile(function, dynamic=False) for function in (iterate, normalize))
    return Form("reference", *both)


class Parametrized:
    """torch.nn.utils' spectral norm of copies of weights, read as fp32 matrices."""

    def __init__(self, weights: Weights) -> None:
        self.modules = [parametrized(weight) for weight in weights.weights]
        self.weights = [next(module.parameters()) for module in self.modules]
        parametrizations: list[Any] = [module.parametrizations for module in self.modules]
        self.norms = [each.weight[0] for each in parametrizations]
        for norm, u, v in zip(self.norms, weights.us, weights.vs, strict=True):
            norm._u.copy_(u)
            norm._v.copy_(v)
        self.upstream = [upstream.flatten(1).float() for upstream in weights.upstream]

    def normalize(self) -> list[Tensor]:
        """One power iteration and Ŵ of every weight: it always does both."""
        return [parametrized_weight(module) for module in self.modules]

    def run(self, direction: str) -> None:
        """What is timed."""
        if direction == "iteration_forward":
            with torch.no_grad():
                self.normalize()
        else:
            torch.autograd.grad(self.normalize(), self.weights, self.upstream)

    def results(self) -> Results:
        """u, v, Ŵ and dW of all weights."""
        normalized = self.normalize()
        dweights = torch.autograd.grad(normalized, self.weights, self.upstream)
        us, vs = [norm._u for norm in self.norms], [norm._v for norm in self.norms]
        return _flat({"u": us, "v": vs, "weight": normalized, "dweight": list(dweights)})


def _flat(named: dict[str, list[Tensor]]) -> Results:
    """Each quantity in one tensor."""
    return {k: torch.cat([t.detach().flatten() for t in v]) for k, v in named.items()}


def check_weights(weights: Weights, *, compiled: bool = False) -> None:
    """Every side against the reference in fp64. Raises Refused."""
    num_terms = max(w.numel() for w in weights.weights)  # of ⟨dŴ, W⟩
    reference = Form("reference")
    truth = reference.results(weights.copy(torch.float64))
    usual = reference.results(weights.copy())
    for name, form in forms(compiled=compiled).items():
        if name != REFERENCE:
            check(name, form.results(weights.copy()), usual, truth, num_terms)
    # torch takes u from v before v from u: as ours of Wᵀ, whose u is v.
    truth, usual = (_of_transposed(weights.copy(dtype)) for dtype in (torch.float64, torch.float32))
    check(PARAMETRIZATION, Parametrized(weights).results(), usual, truth, num_terms)


def _of_transposed(weights: Weights) -> Results:
    """What the reference makes of matrices Wᵀ, turned back."""

    def turned(tensors: list[Tensor]) -> list[Tensor]:
        return [t.detach().flatten(1).T.contiguous() for t in tensors]

    matrices = [weight.requires_grad_() for weight in turned(weights.weights)]
    upstream = turned(weights.upstream)
    transposed = Weights(matrices, weights.vs, weights.us, upstream)
    with kernels.use(REFERENCE):
        iterate(transposed)
        normalized = normalize(transposed)
        dweights = torch.autograd.grad(normalized, matrices, upstream)
    us, vs = transposed.vs, transposed.us
    named = {"u": us, "v": vs, "weight": turned(normalized), "dweight": turned(list(dweights))}
    return _flat(named)


def make_sides(
    weights: Weights, direction: str, *, compiled: bool = False
) -> dict[str, Callable[[], object]]:
    """Every call of a side takes the next of its copies, of which no cache holds all."""
    tensors = weights.weights + weights.us + weights.vs + weights.upstream
    num_bytes = sum(tensor.nbytes for tensor in tensors)
    copies = num_copies(num_bytes, cache_bytes(tensors[0].device))

    def rotating(calls: list[Callable[[], object]]) -> Callable[[], object]:
        turn = itertools.cycle(calls)
        return lambda: next(turn)()

    sides = {
        name: rotating([partial(form.run, weights.copy(), direction) for _ in range(copies)])
        for name, form in forms(compiled=compiled).items()
    }
    if direction != "iteration":
        torchs = [partial(Parametrized(weights).run, direction) for _ in range(copies)]
        sides[PARAMETRIZATION] = rotating([*torchs])
    return sides


@pytest.mark.parametrize("steps", DIRECTIONS)
def test_spectral_norm(session: Session, benchmark: Any, steps: str) -> None:
    """Once per optimiser step; Ŵ once per forward pass. Kept apart they cost their difference.

    torch.compile is a side only with `--compile`.
    """
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
        check=partial(check_weights, weights, compiled=session.compile_asked),
        sides=partial(make_sides, weights, steps, compiled=session.compile_asked),
    )
    session.run(case, benchmark)
