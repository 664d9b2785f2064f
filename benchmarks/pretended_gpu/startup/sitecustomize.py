"""On a pretended GPU: cuDNN's convolutions and cuSOLVER's QR cannot be made to do nothing."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.spectral_norm import cuda as power_iteration_cuda

_LIBRARY = torch.library.Library("aten", "IMPL")
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    size = []
    for n, (taps, step, pad) in enumerate(zip(weight.shape[2:], stride, padding, strict=True)):
        if transposed:
            size.append((x.shape[2 + n] - 1) * step - 2 * pad + taps + output_padding[n])
        else:
            size.append((x.shape[2 + n] + 2 * pad - taps) // step + 1)
    shape = (len(x), weight.shape[1] if transposed else weight.shape[0], *size)
    # In one allocation, as cuDNN's: peaks of memory are counted here.
    layout = _FORMATS[x.ndim]
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _gradients(
    dy: Tensor, x: Tensor, weight: Tensor, bias_sizes: Sequence[int] | None, *rest: Any
) -> tuple[Tensor | None, ...]:
    for_x, for_weight, for_bias = rest[-1]
    return (
        torch.empty_like(x) if for_x else None,
        torch.empty_like(weight) if for_weight else None,
        x.new_empty(bias_sizes) if for_bias and bias_sizes else None,
    )


with warnings.catch_warnings():  # PyTorch warns of kernels that take another's place
    warnings.simplefilter("ignore")
    _LIBRARY.impl("convolution", _convolution, "CUDA")
    _LIBRARY.impl("convolution_backward", _gradients, "CUDA")
torch.nn.init.orthogonal_ = lambda tensor, **_: tensor
power_iteration_cuda.unavailable = lambda: "the GPU is pretended"
