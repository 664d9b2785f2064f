"""Spectral normalisation: every weight divided by its largest singular value.

σ = uᵀ W v,  Ŵ = W / σ,  with u, v the leading singular vectors, tracked by power iteration:
v ← Wᵀu / |Wᵀu|,  u ← Wv / |Wv|

Miyato et al. 2018, as in BigGAN, DVD-GAN and SSW-GAN (all layers, linear and embedding included).
The gradient treats u and v as constants: dW = (dŴ - ⟨dŴ, Ŵ⟩ u vᵀ) / σ. Derivatives of order two and
higher are the reference's in every implementation. Kept for the backward pass: W, u, v and σ, of
which only σ is not there already.

Three operators: `power_iteration_` (`power_iteration.py`) brings u and v of all weights closer;
`spectral_normalize` (`weight.py`) divides one weight; `spectral_normalize_all` (`network.py`)
divides a network's weights at once and folds resampling into them.

Decided: σ is that of the weight at hand, taken in every forward pass, not the one that the power
iteration finds on its way. Weights change without a trace that a kept σ could be checked against
(DeepSpeed writes them through `.data`, which leaves their version as it was), and it costs little:
W is read twice in a row, so the second time mostly from cache.

Shapes: W [R, ...] read as the matrix [R, K]: R outputs, K the product of the rest; u [R], v [K];
L weights. Arithmetic is in the weight's own precision, fp32. FLOPs for N values: 4·N for an
iteration, 4·N for Ŵ and 6·N for dW.
"""

from kernels.spectral_norm.network import spectral_normalize_all
from kernels.spectral_norm.power_iteration import power_iteration_
from kernels.spectral_norm.weight import spectral_normalize

__all__ = ["power_iteration_", "spectral_normalize", "spectral_normalize_all"]
