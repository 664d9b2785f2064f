"""Spectral normalisation: every weight divided by its largest singular value.

σ = uᵀ W v,  Ŵ = W / σ,  with u, v the leading singular vectors, tracked by power iteration:
v ← Wᵀu / |Wᵀu|,  u ← Wv / |Wv|

Miyato et al. 2018, as in BigGAN, DVD-GAN and SSW-GAN (all layers, linear and embedding included).
The gradient treats u and v as constants: dW = (dŴ - ⟨dŴ, Ŵ⟩ u vᵀ) / σ.

Shapes: W [O, ...] read as the matrix [O, K], K the product of the rest; u [O], v [K]. Always in the
weight's own precision (fp32). Bytes per weight of N values: 8·N for one iteration, 8·N for σ and
4·N + N·itemsize(dtype) for Ŵ.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def power_iteration_(
    weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], num_iterations: int = 1
) -> None:
    """Bring every (u, v) closer to its weight's leading singular vectors, in place, untracked.

    All layers in one call, so that the whole network's iterations can become one launch.
    """
    for weight, u_O, v_K in zip(weights, us, vs, strict=True):
        matrix_OK = weight.flatten(1)
        for _ in range(num_iterations):
            v_K.copy_(F.normalize(matrix_OK.T.mv(u_O), dim=0))
            u_O.copy_(F.normalize(matrix_OK.mv(v_K), dim=0))


def spectral_normalize(
    weight: Tensor, u_O: Tensor, v_K: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """W / (uᵀ W v), cast to `dtype` (None keeps the weight's); differentiable in W."""
    sigma = torch.dot(u_O, weight.flatten(1).mv(v_K))
    return (weight / sigma).to(dtype or weight.dtype)
