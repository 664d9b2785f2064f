"""One power iteration for every weight of a network: equations in `kernels.spectral_norm`.

Implementations: "cuda" (csrc/, where built) and "triton", both four launches for all weights
together, for fp32 weights on a GPU, and "reference". Bytes per weight of N values: 8·N, W twice.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.dispatch import REFERENCE, Implementation, Operator, triton_not_preferred
from kernels.registration import operator
from kernels.spectral_norm import cuda
from kernels.spectral_norm.arguments import check_lists, fp32_triton_unsupported, not_fp32


def _cuda_unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"tensors are on {device.type}, not on CUDA"
    return not_fp32(dtype) or cuda.unavailable()


POWER_ITERATION = Operator(
    "power_iteration_",
    Implementation("cuda", _cuda_unsupported),
    Implementation("triton", fp32_triton_unsupported, triton_not_preferred),
)


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


@operator("power_iteration_", mutates_args=("us", "vs"))
def power_iteration_operator(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    num_iterations: int,
    implementation: str,
) -> Tensor:
    """σ [L]; u and v in place."""
    if implementation == "cuda":
        return cuda.power_iteration(weights, us, vs, num_iterations)
    from kernels.spectral_norm import power_iteration_triton

    return power_iteration_triton.power_iteration(weights, us, vs, num_iterations)


@torch.library.register_fake(power_iteration_operator)
def _(weights: Sequence[Tensor], *arguments: Any) -> Tensor:
    return weights[0].new_empty(len(weights))


@torch.no_grad()
def power_iteration_(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    num_iterations: int = 1,
    *,
    implementation: str | None = None,
) -> Tensor:
    """Bring every (u, v) closer to its weight's leading singular vectors, in place, untracked.

    All weights in one call, of any number and any shapes [R, ...] of one dtype on one device: a
    whole network's iteration is four launches. Returns σ = uᵀWv of each with its new u and v, [L].
    Runs are bit-equal. `implementation` as in `kernels.dispatch`.

    Raises ValueError for lists that do not fit, an empty list or weight, vectors that are not
    contiguous or not of their weight's dtype and device, and less than one iteration;
    ImplementationError for an implementation that cannot run.

    >>> weight, u_R, v_K = torch.randn(8, 3, 3, 4), torch.randn(8), torch.randn(36)
    >>> sigma_L = kernels.power_iteration_([weight], [u_R], [v_K], num_iterations=50)
    >>> exact = torch.linalg.matrix_norm(weight.flatten(1), ord=2)
    >>> torch.allclose(sigma_L[0], exact, rtol=0.1)
    True
    """
    check_lists(weights, us, vs)
    if num_iterations < 1:
        raise ValueError(f"{num_iterations} power iterations")
    implementation = POWER_ITERATION.choose(implementation, weights[0].device, weights[0].dtype)
    if implementation == REFERENCE:
        return power_iteration_reference(weights, us, vs, num_iterations)
    return power_iteration_operator(
        [weight.contiguous() for weight in weights],
        list(us),
        list(vs),
        num_iterations,
        implementation,
    )
