"""Convolutional gated recurrent unit over a whole sequence.

r = σ(W_r * [h; x] + b_r)      u = σ(W_u * [h; x] + b_u)
c = relu(W_c * [x; r⊙h] + b_c)
h' = u⊙h + (1-u)⊙c,            h = 0 before the first frame

SSW-GAN, stage 1 (as DVD-GAN): 3x3 convolutions, ReLU in place of tanh.

Shapes: B batch, T frames, C channels of x and of the hidden state h, H x W pixels. Weights
[C, 3, 3, 2C], their inputs concatenated in the order written above.
FLOPs: 2·54·C² per pixel and frame, of which half (the part that reads x) needs no recurrence.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.layout import channels_last, conv2d_weight, fold_frames, unfold_frames


def conv_gru_reference(
    x_BTCHW: Tensor,
    weight_r: Tensor,
    weight_u: Tensor,
    weight_c: Tensor,
    bias_r_C: Tensor,
    bias_u_C: Tensor,
    bias_c_C: Tensor,
) -> Tensor:
    """The equations as they stand, frame by frame; returns every h, [B, T, C, H, W]."""
    h = torch.zeros_like(x_BTCHW[:, 0])
    states = []
    for x in x_BTCHW.unbind(1):
        hx = torch.cat([h, x], dim=1)
        r = torch.sigmoid(F.conv2d(hx, conv2d_weight(weight_r), bias_r_C, padding=1))
        u = torch.sigmoid(F.conv2d(hx, conv2d_weight(weight_u), bias_u_C, padding=1))
        xh = torch.cat([x, r * h], dim=1)
        c = F.relu(F.conv2d(xh, conv2d_weight(weight_c), bias_c_C, padding=1))
        h = u * h + (1 - u) * c
        states.append(h)
    return torch.stack(states, dim=1)


def conv_gru(
    x_BTCHW: Tensor,
    weight_r: Tensor,
    weight_u: Tensor,
    weight_c: Tensor,
    bias_r_C: Tensor,
    bias_u_C: Tensor,
    bias_c_C: Tensor,
) -> Tensor:
    """The same function with less work; returns every h, [B, T, C, H, W].

    What reads x is one convolution over all frames, outside the loop, and over one frame only
    when x is the same at every time step (a stride of 0, as `expand` makes it: the generator's
    first unit). What reads h is skipped at the first frame, where h = 0.
    """
    num_frames, channels = x_BTCHW.shape[1:3]
    r_h, r_x = weight_r.split(channels, dim=-1)
    u_h, u_x = weight_u.split(channels, dim=-1)
    c_x, c_h = weight_c.split(channels, dim=-1)

    constant = num_frames > 1 and x_BTCHW.stride(1) == 0
    inputs = x_BTCHW[:, :1] if constant else x_BTCHW
    gates_x = F.conv2d(
        fold_frames(inputs),
        conv2d_weight(torch.cat([r_x, u_x, c_x])),
        torch.cat([bias_r_C, bias_u_C, bias_c_C]),
        padding=1,
    )
    r_x_BTCHW, u_x_BTCHW, c_x_BTCHW = (
        gate.expand(-1, num_frames, -1, -1, -1)
        for gate in unfold_frames(gates_x, inputs.shape[1]).chunk(3, dim=2)
    )
    ru_h_weight, c_h_weight = conv2d_weight(torch.cat([r_h, u_h])), conv2d_weight(c_h)

    h = (1 - torch.sigmoid(u_x_BTCHW[:, 0])) * F.relu(c_x_BTCHW[:, 0])
    states = [h]
    for t in range(1, num_frames):
        r_h_t, u_h_t = F.conv2d(h, ru_h_weight, padding=1).chunk(2, dim=1)
        r = torch.sigmoid(r_x_BTCHW[:, t] + r_h_t)
        u = torch.sigmoid(u_x_BTCHW[:, t] + u_h_t)
        c = F.relu(c_x_BTCHW[:, t] + F.conv2d(r * h, c_h_weight, padding=1))
        h = torch.lerp(c, h, u)
        states.append(h)
    return channels_last(torch.stack(states, dim=1))
