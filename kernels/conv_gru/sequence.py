"""`kernels.conv_gru` over time: convolutions, the loop around the gates, and its gradient.

Everything inside is time-major, [T, B, H, W, C], in which one frame of the whole batch is
contiguous, and so are all frames but the first or the last: neither a step nor a convolution over
all steps copies. y alone is [B, T, H, W, C]; it is written step by step.

With z_r, z_u, z_c the values before the nonlinearities, ∘ᵀ an input gradient, and from the last
frame to the first,

dh'  = dy + [dh' u + r drh + W_ru,h ∘ᵀ (dz_r, dz_u)] of the next frame
dz_u = dh' (h - c) u (1 - u)     dz_c = dh' (1 - u) [c > 0]     drh = W_c,h ∘ᵀ dz_c
dz_r = drh h r (1 - r)

Weight gradients need no recurrence: they are taken after the loop, over all frames at once.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.common.large_batches import Gradients, gradients_in_parts, in_parts
from kernels.common.layout import conv2d_weight
from kernels.conv_gru.gates import passes
from kernels.conv_gru.pytorch import conv_gru_reference


class GRUOperands(NamedTuple):
    """The tensors of a call. x has one frame if all of its frames are the same."""

    x_BtCHW: Tensor
    weight_r: Tensor
    weight_u: Tensor
    weight_c: Tensor
    bias_r_C: Tensor
    bias_u_C: Tensor
    bias_c_C: Tensor


class Parts(NamedTuple):
    """The six halves of the weights, as PyTorch's [O, I, 3, 3], grouped as they are applied."""

    ru_h: Tensor
    c_h: Tensor
    ru_x: Tensor
    c_x: Tensor


class Gates(NamedTuple):
    """What the backward pass reads beside every h."""

    ru_TBHW2C: Tensor
    c_TBHWC: Tensor


class ConvGRUFunction(torch.autograd.Function):
    """`run`, and its gradient."""

    @staticmethod
    def forward(ctx: Any, num_frames: int, implementation: str, *tensors: Tensor) -> Tensor:
        """Every h, [B, T, C, H, W]."""
        y_BTCHW, gates = run(GRUOperands(*tensors), num_frames, implementation, keep_gates=True)
        assert gates is not None
        ctx.save_for_backward(*tensors, y_BTCHW, *gates)
        ctx.num_frames, ctx.implementation = num_frames, implementation
        return y_BTCHW

    @staticmethod
    def backward(ctx: Any, dy_BTCHW: Tensor) -> tuple[Tensor | None, ...]:
        """Of the operands."""
        *tensors, y_BTCHW, ru, c = ctx.saved_tensors  # read once: checkpointing allows no more
        operands, wants = GRUOperands(*tensors), ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():  # a graph of the backward pass is wanted
            grads = _differentiable_gradients(operands, wants, ctx.num_frames, dy_BTCHW)
        else:
            grads = gradients(operands, wants, y_BTCHW, Gates(ru, c), dy_BTCHW, ctx.implementation)
        return None, None, *grads


def run(
    operands: GRUOperands,
    num_frames: int,
    implementation: str,
    *,
    keep_gates: bool,
    hidden_BCHW: Tensor | None = None,
) -> tuple[Tensor, Gates | None]:
    """Every h, [B, T, C, H, W] channels last in memory, and the gates if they are kept.

    Before the first frame h is 0 if it is not given; `gradients` are of that case.
    """
    x_BtCHW, *weights = operands[:4]
    gate_passes, T = passes(implementation), num_frames
    B, _, C, H, W = x_BtCHW.shape
    parts = _parts(*weights)
    biases = torch.cat(operands[4:])
    gates_x_tBHW3C = _input_gates(x_BtCHW, parts, biases)

    y_BTHWC = x_BtCHW.new_empty(B, T, H, W, C)
    h_BHWC, rh_BHWC = (x_BtCHW.new_empty(B, H, W, C) for _ in range(2))
    if hidden_BCHW is not None:
        h_BHWC.copy_(hidden_BCHW.permute(0, 2, 3, 1))
    num_kept = T if keep_gates else 1
    ru_TBHW2C = x_BtCHW.new_empty(num_kept, B, H, W, 2 * C)
    c_TBHWC = x_BtCHW.new_empty(T, B, H, W, C) if keep_gates else None

    for t in range(T):
        gates_x_BHW3C = gates_x_tBHW3C[t % len(gates_x_tBHW3C)]
        ru_BHW2C = ru_TBHW2C[t % num_kept]
        c_BHWC = None if c_TBHWC is None else c_TBHWC[t]
        candidate_h_BHWC = None
        if t > 0 or hidden_BCHW is not None:
            gates_h_BHW2C = _convolve(h_BHWC, parts.ru_h)
            gate_passes.reset_update(gates_x_BHW3C, gates_h_BHW2C, h_BHWC, ru_BHW2C, rh_BHWC)
            candidate_h_BHWC = _convolve(rh_BHWC, parts.c_h)
        gate_passes.candidate(
            gates_x_BHW3C, candidate_h_BHWC, ru_BHW2C, h_BHWC, c_BHWC, y_BTHWC[:, t]
        )
    gates = None if c_TBHWC is None else Gates(ru_TBHW2C, c_TBHWC)
    return y_BTHWC.permute(0, 1, 4, 2, 3), gates


def gradients(
    operands: GRUOperands,
    wants: Sequence[bool],
    y_BTCHW: Tensor,
    gates: Gates,
    dy_BTCHW: Tensor,
    implementation: str,
) -> list[Tensor | None]:
    """Those of the operands that are wanted."""
    gate_passes, parts = passes(implementation), _parts(*operands[1:4])
    h_TBHWC = _time_major(y_BTCHW[:, :-1])
    ru_TBHW2C, c_TBHWC = gates

    dy_BTHWC = dy_BTCHW.permute(0, 1, 3, 4, 2).contiguous()
    dz_ru_TBHW2C, dz_c_TBHWC = torch.empty_like(ru_TBHW2C), torch.empty_like(c_TBHWC)
    rh_TBHWC = torch.empty_like(h_TBHWC)
    direct_BHWC = torch.empty_like(c_TBHWC[0])
    ru_h_back, c_h_back = _backwards(parts.ru_h), _backwards(parts.c_h)
    dh_BHWC = None
    for t in reversed(range(len(c_TBHWC))):
        h_BHWC = h_TBHWC[t - 1] if t > 0 else None
        gate_passes.candidate_grad(
            dy_BTHWC[:, t], direct_BHWC, dh_BHWC, h_BHWC,
            ru_TBHW2C[t], c_TBHWC[t], dz_ru_TBHW2C[t], dz_c_TBHWC[t],
        )  # fmt: skip
        if h_BHWC is not None:
            drh_BHWC = _convolve(dz_c_TBHWC[t], c_h_back)
            gate_passes.reset_grad(
                drh_BHWC, h_BHWC, ru_TBHW2C[t], dz_ru_TBHW2C[t], direct_BHWC, rh_TBHWC[t - 1]
            )
            dh_BHWC = _convolve(dz_ru_TBHW2C[t], ru_h_back)
    return _after_the_loop(
        operands.x_BtCHW, wants, parts, h_TBHWC, rh_TBHWC, dz_ru_TBHW2C, dz_c_TBHWC
    )


def _after_the_loop(
    x_BtCHW: Tensor,
    wants: Sequence[bool],
    parts: Parts,
    h_TBHWC: Tensor,
    rh_TBHWC: Tensor,
    dz_ru_TBHW2C: Tensor,
    dz_c_TBHWC: Tensor,
) -> list[Tensor | None]:
    """The gradients of the operands that are wanted; h and r⊙h are what later frames read."""
    wants_x, wants_parameters = wants[0], any(wants[1:])
    found: list[Tensor | None] = [None] * 7
    if wants_parameters:
        ru_h = _weight_gradient(dz_ru_TBHW2C[1:], h_TBHWC, parts.ru_h)
        c_h = _weight_gradient(dz_c_TBHWC[1:], rh_TBHWC, parts.c_h)
    x_tBHWC = _time_major(x_BtCHW)
    if len(x_tBHWC) < len(dz_c_TBHWC):  # x is constant: so is what its convolution is given back
        dz_ru_TBHW2C, dz_c_TBHWC = (dz.sum(0, keepdim=True) for dz in (dz_ru_TBHW2C, dz_c_TBHWC))
    mask = [wants_x, wants_parameters, wants_parameters]
    dx_ru, ru_x, bias_ru = _convolution_gradients(dz_ru_TBHW2C, x_tBHWC, parts.ru_x, mask)
    dx_c, c_x, bias_c = _convolution_gradients(dz_c_TBHWC, x_tBHWC, parts.c_x, mask)
    if wants_x:
        found[0] = dx_ru.add_(dx_c).unflatten(0, x_tBHWC.shape[:2]).transpose(0, 1)
    if wants_parameters:
        (r_h, u_h), (r_x, u_x) = ru_h.chunk(2), ru_x.chunk(2)
        halves = (r_h, r_x), (u_h, u_x), (c_x, c_h)
        found[1:4] = (torch.cat(pair, dim=1).permute(0, 2, 3, 1) for pair in halves)
        found[4:] = *bias_ru.chunk(2), bias_c
    return [grad if wanted else None for grad, wanted in zip(found, wants, strict=True)]


def _differentiable_gradients(
    operands: GRUOperands, wants: Sequence[bool], num_frames: int, dy_BTCHW: Tensor
) -> list[Tensor | None]:
    """The gradients as the reference's, which have derivatives."""
    x_BtCHW, *parameters = operands
    y_BTCHW = conv_gru_reference(x_BtCHW.expand(-1, num_frames, -1, -1, -1), *parameters)
    wanted = [i for i, wants_this in enumerate(wants) if wants_this]
    grads = torch.autograd.grad(y_BTCHW, [operands[i] for i in wanted], dy_BTCHW, create_graph=True)
    found = dict(zip(wanted, grads, strict=True))
    return [found.get(i) for i in range(len(operands))]


# --------------------------------------------------------------------------- convolutions


def _parts(weight_r: Tensor, weight_u: Tensor, weight_c: Tensor) -> Parts:
    C = weight_r.shape[0]
    r_h, r_x = weight_r.split(C, dim=-1)
    u_h, u_x = weight_u.split(C, dim=-1)
    c_x, c_h = weight_c.split(C, dim=-1)
    halves = torch.cat([r_h, u_h]), c_h.contiguous(), torch.cat([r_x, u_x]), c_x.contiguous()
    return Parts(*map(conv2d_weight, halves))


def _input_gates(x_BtCHW: Tensor, parts: Parts, biases_3C: Tensor) -> Tensor:
    """What x adds to all gates, [t, B, H, W, 3C]."""
    x_tBHWC, weight = _time_major(x_BtCHW), torch.cat([parts.ru_x, parts.c_x])
    gates = _convolve(x_tBHWC.flatten(0, 1), weight, biases_3C)
    return gates.unflatten(0, x_tBHWC.shape[:2])


def _time_major(x_BTCHW: Tensor) -> Tensor:
    """[B, T, C, H, W] → contiguous [T, B, H, W, C], a copy unless B or T is 1."""
    return x_BTCHW.permute(1, 0, 3, 4, 2).contiguous()


def _convolve(x_NHWI: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """3x3, "same"; [N, H, W, I] → [N, H, W, O]."""
    x_NIHW = x_NHWI.permute(0, 3, 1, 2)
    y_values = math.prod(x_NHWI.shape[:3]) * len(weight)
    y_NOHW = in_parts(lambda part: F.conv2d(part, weight, bias, padding=1), x_NIHW, y_values)
    # A copy only where a convolution answers in another layout: fp64 on a CPU.
    return y_NOHW.permute(0, 2, 3, 1).contiguous()


def _backwards(weight_OIhw: Tensor) -> Tensor:
    """The weight with which a convolution of dy is the input gradient, channels last.

    A convolution, not aten's input gradient: the same work, and a forward convolution has the
    better choice of kernels for channels-last frames.
    """
    flipped = weight_OIhw.flip(2, 3).transpose(0, 1)
    return flipped.contiguous(memory_format=torch.channels_last)


def _convolution_gradients(
    dy_TBHWO: Tensor, x_TBHWI: Tensor, weight: Tensor, mask: list[bool]
) -> tuple[Any, Any, Any]:
    """Of all frames' x, the weight and the bias, those that `mask` asks for."""

    def differentiate(dy: Tensor, x: Tensor) -> Gradients:
        ones, zeros = [1, 1], [0, 0]
        found: Gradients = torch.ops.aten.convolution_backward(
            dy, x, weight, [len(weight)], ones, ones, ones, False, zeros, 1, mask
        )
        return found

    dy, x = (v.flatten(0, 1).permute(0, 3, 1, 2) for v in (dy_TBHWO, x_TBHWI))
    return gradients_in_parts(differentiate, dy, x)


def _weight_gradient(dy_TBHWO: Tensor, x_TBHWI: Tensor, weight: Tensor) -> Tensor:
    if len(x_TBHWI) == 0:  # one frame: nothing read h
        return torch.zeros_like(weight)
    found: Tensor = _convolution_gradients(dy_TBHWO, x_TBHWI, weight, [False, True, False])[1]
    return found
