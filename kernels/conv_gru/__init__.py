"""Convolutional gated recurrent unit over a whole sequence.

r = σ(W_r * [h; x] + b_r)      u = σ(W_u * [h; x] + b_u)
c = relu(W_c * [x; r⊙h] + b_c)
h' = u⊙h + (1-u)⊙c,            h = 0 before the first frame

SSW-GAN, stage 1 (as DVD-GAN): 3x3 convolutions, ReLU in place of tanh.

Shapes: B batch, T frames, C channels of x and of the hidden state h, H x W pixels. Weights
[C, 3, 3, 2C], their inputs concatenated in the order written above; weights and biases in the
dtype of x (fp32, fp16, bf16, fp64), in which r, u, c and h are kept too. Gates are computed in
fp32 (fp64 for fp64).

FLOPs: 2·54·C² per pixel and frame, of which half (the part that reads x) needs no recurrence and
is one convolution over all frames, over one frame where x is the same at every time step (a stride
of 0, as `expand` makes it: the generator's first unit). What reads h is skipped at the first
frame, where h = 0. The backward pass costs twice the forward pass's; weight gradients are one
convolution over all frames.

Gates, bytes per element of h and frame in bf16: forward 16 (the convolutions' shares and h are
read; r, u, r⊙h written) + 14 (shares, u and h read; c, and h' twice, written; 2 less where no
gradient is wanted); backward 18 (u, c) + 14 (r, and r⊙h for the weight gradient). To and from
time-major memory, once for the whole sequence: 4 forward (x), 8 backward (x, h).

Kept for the backward pass, beside x (one frame of it if it is constant), y (which is h) and the
weights: r, u and c, per element of y 6 bytes in bf16 and 12 in fp32. The reference keeps 9 values,
y among them.

Implementations: "triton" (the gates; fp32, fp16, bf16), "pytorch" (the gates in PyTorch operators,
on any device), "reference" (autograd through the equations as they stand). Convolutions are
PyTorch's in all. Derivatives of order two and higher are the reference's in all of them.
"""

import torch
from torch import Tensor

from kernels.conv_gru.pytorch import conv_gru_reference
from kernels.conv_gru.sequence import ConvGRUFunction, GRUOperands, run
from kernels.dispatch import (
    REFERENCE,
    Implementation,
    Operator,
    everywhere,
    triton_not_preferred,
    triton_unsupported,
)

OPERATOR = Operator(
    "conv_gru",
    Implementation("triton", triton_unsupported, triton_not_preferred),
    Implementation("pytorch", everywhere),
)


def conv_gru(
    x_BTCHW: Tensor,
    weight_r: Tensor,
    weight_u: Tensor,
    weight_c: Tensor,
    bias_r_C: Tensor,
    bias_u_C: Tensor,
    bias_c_C: Tensor,
    *,
    hidden_BCHW: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Every h, [B, T, C, H, W], channels last in memory.

    `hidden_BCHW` is h before the first frame, where a sequence goes on whose earlier frames an
    earlier call was given: that call's last h. Where gradients are wanted, the reference takes it.
    `implementation` as in `kernels.dispatch`.

    No step waits for the device or looks at a value, so a caller may capture the call and its
    backward pass in a CUDA graph.

    Raises ValueError for shapes that do not fit and a video without frames; ImplementationError for
    an implementation that cannot run.

    >>> weights = [torch.randn(8, 3, 3, 16) / 12 for _ in range(3)]
    >>> kernels.conv_gru(torch.randn(2, 4, 8, 6, 6), *weights, *torch.zeros(3, 8)).shape
    torch.Size([2, 4, 8, 6, 6])
    """
    operands = GRUOperands(x_BTCHW, weight_r, weight_u, weight_c, bias_r_C, bias_u_C, bias_c_C)
    _check(*operands)
    if hidden_BCHW is not None and hidden_BCHW.shape != x_BTCHW[:, 0].shape:
        expected, given = list(x_BTCHW[:, 0].shape), tuple(hidden_BCHW.shape)
        raise ValueError(f"h must be {expected}, not {given}")
    implementation = OPERATOR.choose(implementation, x_BTCHW.device, x_BTCHW.dtype)
    wants_gradients = torch.is_grad_enabled() and any(
        v is not None and v.requires_grad for v in (*operands, hidden_BCHW)
    )
    continues = hidden_BCHW is not None
    if implementation == REFERENCE or x_BTCHW.numel() == 0 or (continues and wants_gradients):
        return conv_gru_reference(*operands, hidden_BCHW)
    num_frames = x_BTCHW.shape[1]
    if num_frames > 1 and x_BTCHW.stride(1) == 0:
        operands = operands._replace(x_BtCHW=x_BTCHW[:, :1])
    if wants_gradients:
        y_BTCHW: Tensor = ConvGRUFunction.apply(num_frames, implementation, *operands)
        return y_BTCHW
    return run(operands, num_frames, implementation, keep_gates=False, hidden_BCHW=hidden_BCHW)[0]


def _check(x_BTCHW: Tensor, *parameters: Tensor) -> None:
    if x_BTCHW.dim() != 5 or x_BTCHW.shape[1] == 0:
        shape = tuple(x_BTCHW.shape)
        raise ValueError(f"x must be [B, T, C, H, W] with at least one frame, not {shape}")
    C = x_BTCHW.shape[2]
    names = "weight_r", "weight_u", "weight_c", "bias_r", "bias_u", "bias_c"
    for name, value in zip(names, parameters, strict=True):
        expected = (C, 3, 3, 2 * C) if name.startswith("weight") else (C,)
        if tuple(value.shape) != expected:
            raise ValueError(f"{name} must be {list(expected)}, not {tuple(value.shape)}")
