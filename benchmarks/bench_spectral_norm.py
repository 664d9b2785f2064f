"""Spectral norm of all weights of stage 2's generator, beside torch's own parametrization."""

import functools
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import kernels
from benchmarks.calls import kinetics
from benchmarks.correctness import Results, check
from benchmarks.session import COMPILED, OURS, REFERENCE, Case, Session
from benchmarks.timing import Run, Sides, cache_bytes, num_copies
from engine.models import build_generator
from engine.models.construction import compute_dtype
from engine.models.spectral import spectral_weights
from kernels.spectral_norm.floor import spectral_norm_floor

PARAMETRIZATION = "parametrizations"
ITERATION, FORWARD, ALL = "iteration", "iteration_forward", "iteration_forward_backward"
Lists = dict[str, list[Tensor]]
"""u, v, Ŵ and dW of all weights, and "sigma" where it is told, as far as they were computed."""
Function = Callable[["Weights"], list[Tensor]]
Pass = Callable[[str], Lists]
"""A side on weights of its own: what is timed, of one of the directions."""


class Weights(NamedTuple):
    """A network's weights, each with its vectors and an upstream gradient of Ŵ."""

    weights: list[Tensor]
    us: list[Tensor]
    vs: list[Tensor]
    upstream: list[Tensor]

    def copy(self, dtype: torch.dtype | None = None) -> "Weights":
        """Sharing nothing; in `dtype` if that is given."""
        own = Weights(
            *([t.detach().to(dtype or t.dtype, copy=True) for t in tensors] for tensors in self)
        )
        return own._replace(weights=[weight.requires_grad_() for weight in own.weights])


def draw(shapes: Sequence[torch.Size], dtype: torch.dtype, device: torch.device) -> Weights:
    """Gaussian weights of standard deviation 0.02, and unit vectors."""
    random = torch.Generator(device).manual_seed(0)
    randn = partial(torch.randn, generator=random, device=device)
    return Weights(
        weights=[0.02 * randn(shape) for shape in shapes],
        us=[nn.functional.normalize(randn(shape[0]), dim=0) for shape in shapes],
        vs=[nn.functional.normalize(randn(shape[1:].numel()), dim=0) for shape in shapes],
        upstream=[randn(shape).to(dtype) for shape in shapes],
    ).copy()


# --------------------------------------------------------------------------------------- sides


def iterate(weights: Weights) -> list[Tensor]:
    """One power iteration; σ of every weight."""
    return [kernels.power_iteration_(weights.weights, weights.us, weights.vs)]


def normalize(weights: Weights) -> list[Tensor]:
    """Ŵ of every weight, in the dtype of its upstream gradient."""
    dtypes = [upstream.dtype for upstream in weights.upstream]
    unfolded = [None] * len(dtypes)
    return kernels.spectral_normalize_all(*weights[:3], dtypes, unfolded)


@functools.cache
def compiled(function: Function) -> Function:
    """Once for all cases: a graph of so many weights compiles for many minutes."""
    return torch.compile(function, dynamic=False)


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


def parametrizations(weights: Weights) -> tuple[Weights, Function]:
    """Copies of weights in torch.nn.utils' spectral norm, as fp32 matrices, and its forward pass.

    The iteration is part of that.
    """
    modules: list[Any] = [parametrized(weight) for weight in weights.weights]
    norms = [module.parametrizations.weight[0] for module in modules]
    for norm, u, v in zip(norms, weights.us, weights.vs, strict=True):
        norm._u.copy_(u)
        norm._v.copy_(v)
    own = Weights(
        weights=[next(module.parameters()) for module in modules],
        us=[norm._u for norm in norms],
        vs=[norm._v for norm in norms],
        upstream=[upstream.flatten(1).float() for upstream in weights.upstream],
    )
    return own, lambda _: [parametrized_weight(module) for module in modules]


def make_side(name: str, weights: Weights) -> Pass:
    """What is timed, on a copy of the weights."""
    steps: tuple[Function, Function] = iterate, normalize
    iterate_own, normalize_own = map(compiled, steps) if name == COMPILED else steps
    own = weights.copy()
    if name == PARAMETRIZATION:
        own, normalize_own = parametrizations(weights)

    def run(direction: str) -> Lists:
        found: Lists = {"u": own.us, "v": own.vs}
        with kernels.use("auto" if name == OURS else REFERENCE):
            if name != PARAMETRIZATION:
                found["sigma"] = iterate_own(own)
            if direction == ITERATION:
                return found
            with torch.set_grad_enabled(direction == ALL):
                found["weight"] = normalize_own(own)
            if direction == ALL:
                gradients = torch.autograd.grad(found["weight"], own.weights, own.upstream)
                found["dweight"] = list(gradients)
        return found

    return run


def check_weights(weights: Weights, *, compiles: bool = False) -> None:
    """Every side against the reference in fp64. Raises Refused."""

    def results(run: Pass) -> Results:
        found = run(ALL)
        return {k: torch.cat([t.detach().flatten() for t in v]) for k, v in found.items()}

    num_terms = max(w.numel() for w in weights.weights)  # of ⟨dŴ, W⟩
    wide, narrow = weights.copy(torch.float64), weights.copy(torch.float32)
    usual, truth = (results(make_side(REFERENCE, of)) for of in (weights, wide))
    for name in (OURS, *[COMPILED] * compiles):
        check(name, results(make_side(name, weights)), usual, truth, num_terms)
    # torch takes u from v before v from u: as ours of Wᵀ, whose u is v.
    usual, truth = (results(of_transposed(of)) for of in (narrow, wide))
    got = results(make_side(PARAMETRIZATION, weights))
    check(PARAMETRIZATION, got, usual, truth, num_terms)


def of_transposed(weights: Weights) -> Pass:
    """What the reference makes of matrices Wᵀ, turned back."""

    def turned(tensors: list[Tensor]) -> list[Tensor]:
        return [t.detach().flatten(1).T.contiguous() for t in tensors]

    matrices, upstream = turned(weights.weights), turned(weights.upstream)
    run = make_side(REFERENCE, Weights(matrices, weights.vs, weights.us, upstream))

    def run_and_turn_back(direction: str) -> Lists:
        found = run(direction)
        back = {name: turned(found[name]) for name in ("weight", "dweight")}
        return {"u": found["v"], "v": found["u"]} | back

    return run_and_turn_back


def make_sides(weights: Weights, direction: str, *, compiles: bool = False) -> Sides:
    """Every call of a side takes the next of its copies, of which no cache holds all."""
    num_bytes = sum(tensor.nbytes for tensors in weights for tensor in tensors)
    copies = num_copies(num_bytes, cache_bytes(weights.us[0].device))

    def rotating(name: str) -> Run:
        turn = itertools.cycle([make_side(name, weights) for _ in range(copies)])
        return lambda: next(turn)(direction)

    names = [OURS, REFERENCE, *[COMPILED] * compiles]
    names += [PARAMETRIZATION] * (direction != ITERATION)
    return {name: rotating(name) for name in names}


@pytest.mark.parametrize("steps", [ITERATION, FORWARD, ALL])
def test_spectral_norm(session: Session, benchmark: Any, steps: str) -> None:
    """Once per optimiser step; Ŵ once per forward pass. Kept apart they cost their difference.

    torch.compile is a side only with `--compile`.
    """
    if session.quick and steps != ALL:
        pytest.skip("--quick measures everything together only")
    config = kinetics(reduced=session.device.type != "cuda")
    with torch.device("meta"):
        layers = spectral_weights(build_generator(config, 2))
    dtype = compute_dtype(config.stages[2])
    weights = draw([layer.weight.shape for layer in layers], dtype, session.device)
    num_values = sum(weight.numel() for weight in weights.weights)
    passed = {"normalize": steps != ITERATION, "backward": steps == ALL}
    case = Case(
        operator="spectral_norm",
        shape=f"{len(layers)} weights of {num_values / 1e6:.1f} M",
        direction=steps,
        dtype=dtype,
        cost=spectral_norm_floor(num_values, dtype.itemsize, **passed),
        check=partial(check_weights, weights, compiles=session.compile_asked),
        sides=partial(make_sides, weights, steps, compiles=session.compile_asked),
    )
    session.run(case, benchmark)
