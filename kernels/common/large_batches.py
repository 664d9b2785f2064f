"""Convolutions of more values than cuDNN indexes, in parts of the batch.

cuDNN counts a tensor's values in 32 bits. PyTorch hands it larger tensors as they are; reported are
far slower kernels (pytorch#128936) and failures (pytorch#117736), neither tried here. Samples and
frames do not see each other in a convolution, so parts of the batch give the same y and dx. A
weight's gradient is the sum of its parts', added in fp32: it differs by rounding.

Bytes moved besides, where there are parts: y (or dx) once read and once written. References stay
whole.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

MOST_VALUES = 2**31 - 1
"""Of one tensor that a convolution reads or writes."""

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def in_parts(run: Callable[[Tensor], Tensor], x: Tensor, y_values: int) -> Tensor:
    """`run(x)`, a convolution [N, I, ...] → [N, O, ...] whose y has `y_values` values.

    Differentiable where `run` is.
    """
    num_parts = _num_parts(len(x), x.numel(), y_values)
    if num_parts == 1:
        return run(x)
    if torch.is_grad_enabled():
        return torch.cat([run(part) for part in x.chunk(num_parts)])
    # Not cat, which would hold every part beside the whole.
    whole: Tensor | None = None
    for places in _places(len(x), num_parts):
        whole = _with_part(whole, run(x[places]), places, len(x))
    assert whole is not None
    return whole


def gradients_in_parts(
    run: Callable[[Tensor, Tensor], Gradients], dy: Tensor, x: Tensor
) -> Gradients:
    """`run(dy, x)`, the gradients of x, the weight and the bias, those that it does not skip."""
    num_parts = _num_parts(len(x), x.numel(), dy.numel())
    if num_parts == 1:
        return run(dy, x)
    dx: Tensor | None = None
    sums: list[Tensor | None] = [None, None]
    for places in _places(len(x), num_parts):
        part, *of_parameters = run(dy[places], x[places])
        if part is not None:
            dx = _with_part(dx, part, places, len(x))
        sums = [_added(*pair) for pair in zip(sums, of_parameters, strict=True)]
    dweight, dbias = (None if total is None else total.to(x.dtype) for total in sums)
    return dx, dweight, dbias


def _with_part(whole: Tensor | None, part: Tensor, places: slice, num_items: int) -> Tensor:
    """The whole, channels last, made with its first part."""
    if whole is None:
        shape = num_items, *part.shape[1:]
        layout = torch.channels_last if part.ndim == 4 else torch.channels_last_3d
        whole = torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=layout)
    whole[places] = part
    return whole


def _added(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """In fp32, or fp64 where the parts are."""
    if part is None:
        return None
    part = part.to(torch.promote_types(part.dtype, torch.float32))
    return part if total is None else total.add_(part)


def _num_parts(num_items: int, *num_values: int) -> int:
    """So that none of the tensors has more than `MOST_VALUES`, or one item each."""
    most = max(num_values)
    if most <= MOST_VALUES:
        return 1
    items = max(1, MOST_VALUES * num_items // most)
    return -(-num_items // items)


def _places(num_items: int, num_parts: int) -> Iterator[slice]:
    """As `Tensor.chunk` cuts."""
    size = -(-num_items // num_parts)
    return (slice(first, first + size) for first in range(0, num_items, size))
