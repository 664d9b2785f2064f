"""The gates of `kernels.conv_gru` in PyTorch operators, and the differentiable reference.

Names, arguments and results of the gate passes are those of `triton.py`: they write into
tensors that they are given, so that a whole sequence is laid out once. Shapes: one frame of the
batch with its channels last, [B, H, W, C], r and u together as [B, H, W, 2C]; fp32 inside, fp64
for fp64. They are not registered: torch.compile sees through them, and on a CPU they cost no
dispatch of ours.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.common.layout import conv2d_weight
from kernels.frame_norm.pytorch import widened


def conv_gru_reference(
    x_BTCHW: Tensor,
    weight_r: Tensor,
    weight_u: Tensor,
    weight_c: Tensor,
    bias_r_C: Tensor,
    bias_u_C: Tensor,
    bias_c_C: Tensor,
    hidden_BCHW: Tensor | None = None,
) -> Tensor:
    """The equations as they stand, frame by frame; returns every h, [B, T, C, H, W].

    Before the first frame h is 0 if it is not given.
    """
    h = torch.zeros_like(x_BTCHW[:, 0]) if hidden_BCHW is None else hidden_BCHW
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


def reset_update(
    gates_x_BHW3C: Tensor,
    gates_h_BHW2C: Tensor,
    h_BHWC: Tensor,
    ru_BHW2C: Tensor,
    rh_BHWC: Tensor,
) -> None:
    """Write r, u and r⊙h."""
    C = h_BHWC.shape[3]
    ru = widened(gates_x_BHW3C[..., : 2 * C]) + widened(gates_h_BHW2C)
    torch.sigmoid(ru, out=ru_BHW2C)
    torch.mul(ru_BHW2C[..., :C], h_BHWC, out=rh_BHWC)


def candidate(
    gates_x_BHW3C: Tensor,
    candidate_h_BHWC: Tensor | None,
    ru_BHW2C: Tensor,
    h_BHWC: Tensor,
    c_BHWC: Tensor | None,
    y_BHWC: Tensor,
) -> None:
    """Write c (if it is wanted) and h', the latter over h and into y.

    Without `candidate_h`, at the first frame, h is 0 whatever `h_BHWC` holds, and r and u are
    written here.
    """
    C = h_BHWC.shape[3]
    c = widened(gates_x_BHW3C[..., 2 * C :])
    if candidate_h_BHWC is None:
        c = torch.relu(c)
        torch.sigmoid(widened(gates_x_BHW3C[..., : 2 * C]), out=ru_BHW2C)
        h = (1 - widened(ru_BHW2C[..., C:])) * c
    else:
        c = torch.relu(c + widened(candidate_h_BHWC))
        h = torch.lerp(c, widened(h_BHWC), widened(ru_BHW2C[..., C:]))
    if c_BHWC is not None:
        c_BHWC.copy_(c)
    h_BHWC.copy_(h)
    y_BHWC.copy_(h)


def candidate_grad(
    dy_BHWC: Tensor,
    direct_BHWC: Tensor,
    dh_BHWC: Tensor | None,
    h_BHWC: Tensor | None,
    ru_BHW2C: Tensor,
    c_BHWC: Tensor,
    dz_ru_BHW2C: Tensor,
    dz_c_BHWC: Tensor,
) -> None:
    """Write the gradients before σ of u and before the relu of c, and dh'⊙u over `direct`.

    dh' = dy + direct + dh: what the next frame's gates and convolutions hand back. Without `dh`,
    at the last frame, dh' = dy. Without h, at the first, h is 0, r has no gradient (0 is written)
    and `direct` is left alone.
    """
    C = c_BHWC.shape[3]
    dh_next, u, c = widened(dy_BHWC), widened(ru_BHW2C[..., C:]), widened(c_BHWC)
    if dh_BHWC is not None:
        dh_next = dh_next + widened(direct_BHWC) + widened(dh_BHWC)
    kept, dc = dh_next * u, dh_next * (1 - u)
    if h_BHWC is None:
        dz_ru_BHW2C[..., :C].zero_()
        dz_ru_BHW2C[..., C:].copy_(-kept * (1 - u) * c)
    else:
        dz_ru_BHW2C[..., C:].copy_(kept * (1 - u) * (widened(h_BHWC) - c))
        direct_BHWC.copy_(kept)
    # Not by c > 0, which drops NaN: a network that breaks must show it.
    dz_c_BHWC.copy_(dc.masked_fill_(c <= 0, 0))


def reset_grad(
    drh_BHWC: Tensor,
    h_BHWC: Tensor,
    ru_BHW2C: Tensor,
    dz_ru_BHW2C: Tensor,
    direct_BHWC: Tensor,
    rh_BHWC: Tensor,
) -> None:
    """Write the gradient before σ of r, and r⊙h again; add drh⊙r to `direct`."""
    C = h_BHWC.shape[3]
    drh, h, r = widened(drh_BHWC), widened(h_BHWC), widened(ru_BHW2C[..., :C])
    kept = drh * r
    dz_ru_BHW2C[..., :C].copy_(kept * (1 - r) * h)
    torch.add(kept, widened(direct_BHWC), out=direct_BHWC)
    torch.mul(r, h, out=rh_BHWC)
