"""Spectral normalisation: every weight divided by its largest singular value.

σ = uᵀ W v,  Ŵ = W / σ,  with u, v the leading singular vectors, tracked by power iteration:
v ← Wᵀu / |Wᵀu|,  u ← Wv / |Wv|

Miyato et al. 2018, as in BigGAN, DVD-GAN and SSW-GAN (all layers, linear and embedding included).
The gradient treats u and v as constants: dW = (dŴ - ⟨dŴ, Ŵ⟩ u vᵀ) / σ. Derivatives of order two and
higher are the reference's in every implementation. Kept for the backward pass: W, u, v and σ, of
which only σ is not there already.

Decided: σ is that of the weight at hand, taken in every forward pass, not the one that the power
iteration finds on its way. Weights change without a trace that a kept σ could be checked against
(DeepSpeed writes them through `.data`, which leaves their version as it was), and it costs little:
W is read twice in a row, so the second time mostly from cache.

Shapes: W [R, ...] read as the matrix [R, K]: R outputs, K the product of the rest; u [R], v [K];
L weights. Arithmetic is in the weight's own precision, fp32. Bytes per weight of N values, with Ŵ
in bf16: one iteration 8·N, W twice; Ŵ 6·N and dW 10·N if what is read again is still in the L2
cache, else 10·N and 12·N. FLOPs 4·N, 4·N and 6·N.

Implementations of the power iteration: "cuda" (csrc/, where built), "triton", both four launches
for all weights together, and "reference"; of W / σ and its gradient: "triton" (two launches each),
"pytorch", "reference", the last being the default on a CPU. The GPU ones are for fp32 weights.
W / σ of a whole network at once, with resampling folded in, is `kernels.spectral_norm_list`.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import power_iteration_cuda
from kernels.implementation import (
    REFERENCE,
    Implementation,
    Operator,
    everywhere,
    triton_obstacle,
    triton_reluctance,
)
from kernels.registration import operator


def _cuda_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"tensors are on {device.type}, not on CUDA"
    return _not_fp32(dtype) or power_iteration_cuda.unavailable()


def fp32_triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton kernels that read fp32 weights cannot run."""
    return triton_obstacle(device, dtype) or _not_fp32(dtype)


def _pytorch_reluctance(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why "auto" does not run the closed form in PyTorch on a CPU."""
    if device.type != "cpu":
        return None
    return "on a CPU an operator's overhead is more than it saves on all but large weights"


def _not_fp32(dtype: torch.dtype) -> str | None:
    return None if dtype == torch.float32 else f"weights are {dtype}, not fp32"


POWER_ITERATION = Operator(
    "power_iteration_",
    Implementation("cuda", _cuda_obstacle),
    Implementation("triton", fp32_triton_obstacle, triton_reluctance),
)
SPECTRAL_NORMALIZE = Operator(
    "spectral_normalize",
    Implementation("triton", fp32_triton_obstacle, triton_reluctance),
    Implementation("pytorch", everywhere, _pytorch_reluctance),
)

# ------------------------------------------------------------------------------- references


@torch.no_grad()
def power_iteration_reference(
    weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], num_iterations: int
) -> Tensor:
    """σ [L]; u and v in place."""
    sigmas = []
    for weight, u_R, v_K in zip(weights, us, vs, strict=True):
        matrix_RK = weight.flatten(1)
        for _ in range(num_iterations):
            v_K.copy_(F.normalize(matrix_RK.T.mv(u_R), dim=0))
            product_R = matrix_RK.mv(v_K)
            u_R.copy_(F.normalize(product_R, dim=0))
        sigmas.append(torch.dot(u_R, product_R))
    return torch.stack(sigmas)


def spectral_normalize_reference(
    weight: Tensor, u_R: Tensor, v_K: Tensor, dtype: torch.dtype
) -> Tensor:
    """W / (uᵀ W v) in `dtype`, differentiable in W."""
    sigma = torch.dot(u_R, weight.flatten(1).mv(v_K))
    return (weight / sigma).to(dtype)


# -------------------------------------------------------------------- operators and fakes


@operator("power_iteration_", mutates_args=("us", "vs"))
def power_iteration_operator(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    num_iterations: int,
    impl: str,
) -> Tensor:
    """σ [L]; u and v in place."""
    if impl == "cuda":
        return power_iteration_cuda.power_iteration(weights, us, vs, num_iterations)
    from kernels import power_iteration_triton

    return power_iteration_triton.power_iteration(weights, us, vs, num_iterations)


@torch.library.register_fake(power_iteration_operator)
def _(weights: Sequence[Tensor], *arguments: Any) -> Tensor:
    return weights[0].new_empty(len(weights))


@operator("spectral_normalize")
def normalize_operator(
    weight: Tensor, u_R: Tensor, v_K: Tensor, dtype: torch.dtype, impl: str
) -> tuple[Tensor, Tensor]:
    """(Ŵ, σ). The weight as it is, not a view: what is saved must be the parameter itself, so that
    ZeRO-3 can drop and gather its values between the forward and the backward pass."""
    if impl == "pytorch":
        sigma = torch.dot(u_R, weight.flatten(1).mv(v_K))
        return (weight / sigma).to(dtype), sigma
    from kernels import spectral_norm_triton

    return spectral_norm_triton.normalize(weight, u_R, v_K, dtype)


@torch.library.register_fake(normalize_operator)
def _(
    weight: Tensor, u_R: Tensor, v_K: Tensor, dtype: torch.dtype, impl: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight, dtype=dtype), weight.new_empty(())


@operator("spectral_normalize_dw")
def gradient_operator(
    dy: Tensor, weight: Tensor, u_R: Tensor, v_K: Tensor, sigma: Tensor, impl: str
) -> Tensor:
    """dW, from dŴ."""
    if impl == "pytorch":
        dy = dy.to(weight.dtype)
        inner = torch.dot(dy.flatten(), weight.flatten()) / sigma
        dw_RK = torch.addr(dy.flatten(1), u_R, v_K * -inner).div_(sigma)
        return dw_RK.view(weight.shape)
    from kernels import spectral_norm_triton

    return spectral_norm_triton.gradient(dy, weight, u_R, v_K, sigma)


@torch.library.register_fake(gradient_operator)
def _(dy: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(weight)


# ------------------------------------------------------------------------------- autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    weight, u_R, v_K, _, ctx.impl = inputs
    ctx.save_for_backward(weight, u_R, v_K, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else a zero for σ is made per weight and pass


def _backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, None, None, None, None]:
    if dy is None:
        return None, None, None, None, None
    weight, u_R, v_K, sigma = ctx.saved_tensors
    if torch.is_grad_enabled():  # a graph of the backward pass is wanted
        dw = _differentiable_gradient(dy, weight, u_R, v_K)
    else:
        dw = gradient_operator(dy.contiguous(), weight, u_R, v_K, sigma, ctx.impl)
    return dw, None, None, None, None


def _differentiable_gradient(dy: Tensor, weight: Tensor, u_R: Tensor, v_K: Tensor) -> Tensor:
    """The closed form in plain operators, σ a function of W."""
    sigma = torch.dot(u_R, weight.flatten(1).mv(v_K))
    dy = dy.to(weight.dtype)
    inner = (dy * weight).sum() / sigma
    return (dy - (inner * torch.outer(u_R, v_K)).view(weight.shape)) / sigma


torch.library.register_autograd(normalize_operator, _backward, setup_context=_save)

# ------------------------------------------------------------------------ public functions


@torch.no_grad()
def power_iteration_(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    num_iterations: int = 1,
    *,
    impl: str | None = None,
) -> Tensor:
    """Bring every (u, v) closer to its weight's leading singular vectors, in place, untracked.

    All weights in one call, of any number and any shapes [R, ...] of one dtype on one device: a
    whole network's iteration is four launches. Returns σ = uᵀWv of each with its new u and v, [L].
    Runs are bit-equal. `impl` as in `kernels.implementation`.

    Raises ValueError for lists that do not fit, an empty list or weight, vectors that are not
    contiguous or not of their weight's dtype and device, and less than one iteration;
    ImplementationError for an implementation that cannot run.
    """
    check_lists(weights, us, vs)
    if num_iterations < 1:
        raise ValueError(f"{num_iterations} power iterations")
    impl = POWER_ITERATION.choose(impl, weights[0].device, weights[0].dtype)
    if impl == REFERENCE:
        return power_iteration_reference(weights, us, vs, num_iterations)
    return power_iteration_operator(
        [weight.contiguous() for weight in weights], list(us), list(vs), num_iterations, impl
    )


def spectral_normalize(
    weight: Tensor,
    u_R: Tensor,
    v_K: Tensor,
    dtype: torch.dtype | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """W / (uᵀ W v), cast to `dtype` (None keeps the weight's); differentiable in W.

    The weight is [R, ...]. u and v are constants: no gradient reaches them, and they must be as
    they are until the backward pass is done. `impl` as in `kernels.implementation`.

    Raises ValueError for vectors that do not fit the weight and for an empty one;
    ImplementationError for an implementation that cannot run.
    """
    _check(weight, u_R, v_K)
    dtype = dtype or weight.dtype
    u_R, v_K = u_R.detach(), v_K.detach()
    impl = SPECTRAL_NORMALIZE.choose(impl, weight.device, weight.dtype)
    if impl == REFERENCE:
        return spectral_normalize_reference(weight, u_R, v_K, dtype)
    y, _ = normalize_operator(weight.contiguous(), u_R.contiguous(), v_K.contiguous(), dtype, impl)
    return y


def check_lists(weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor]) -> None:
    """Raises ValueError for lists that do not fit, as `power_iteration_` says."""
    if not len(weights) == len(us) == len(vs):
        raise ValueError(f"{len(weights)} weights, {len(us)} u and {len(vs)} v")
    if not weights:
        raise ValueError("a list of no weights")
    dtype, device = weights[0].dtype, weights[0].device
    for weight, u_R, v_K in zip(weights, us, vs, strict=True):
        _check(weight, u_R, v_K)
        if weight.dtype != dtype or weight.device != device:
            raise ValueError("weights of one call must be of one dtype on one device")
        if not (u_R.is_contiguous() and v_K.is_contiguous()):
            raise ValueError("u and v of a list must be contiguous")


def _check(weight: Tensor, u_R: Tensor, v_K: Tensor) -> None:
    # Every weight of every pass comes here: as few of PyTorch's attributes as will do.
    shape, dtype, device = weight.shape, weight.dtype, weight.device
    count = math.prod(shape)
    if len(shape) < 2 or count == 0:
        raise ValueError(f"a weight must be [R, ...] and not empty, not {tuple(shape)}")
    for name, vector, length in (("u", u_R, shape[0]), ("v", v_K, count // shape[0])):
        if vector.shape != (length,):
            raise ValueError(f"{name} must be [{length}], not {tuple(vector.shape)}")
        if vector.dtype != dtype or vector.device != device:
            raise ValueError(f"{name} must be of its weight's dtype and on its device")
