"""FLOPs of our operators, for `torch.utils.flop_counter`, which cannot look inside them.

Two per multiply-add, as PyTorch counts its own: of convolutions and matrix products, borders
included; elementwise work and matrix times vector (spectral norm) are none. Operators that have no
formula here hold no product. Importing this module registers them; `kernels` itself does not,
because the counter imports Triton.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import kernels.convolution.fused  # noqa: F401 — defines the operators

Shape = Sequence[int]


@register_flop_formula(torch.ops.sswgan.convolution)
def convolution_flops(
    x_BTSI: Shape,
    weight_OabI: Shape,
    bias: Shape | None,
    residual: Shape | None,
    video: Shape | None,
    low_weight_O11I: Shape | None,
    *_: Any,
    **__: Any,
) -> int:
    """The convolution, and x_l's projection at every value of y."""
    product = 2 * math.prod(x_BTSI[:3]) * math.prod(weight_OabI)
    return product + _projection_flops(x_BTSI, low_weight_O11I)


@register_flop_formula(torch.ops.sswgan.add_terms_)
def add_terms_flops(
    y_BTSO: Shape,
    bias: Shape | None,
    residual: Shape | None,
    video: Shape | None,
    low_weight_O11I: Shape | None,
    *_: Any,
    **__: Any,
) -> int:
    """x_l's projection at every value of y."""
    return _projection_flops(y_BTSO, low_weight_O11I)


def _projection_flops(rows_BTS: Shape, low_weight_O11I: Shape | None) -> int:
    if low_weight_O11I is None:
        return 0
    return 2 * math.prod(rows_BTS[:3]) * math.prod(low_weight_O11I)
