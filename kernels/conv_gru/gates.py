"""The registered operators of `kernels.conv_gru`: its gates, elementwise, forward and backward.

They write into the tensors that they are given and return nothing; `pytorch.py` describes
the arguments and has the same functions in PyTorch. Only the Triton kernels are registered:
torch.compile sees PyTorch's operators as they are, and fuses them.
"""

from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kernels.conv_gru import pytorch as conv_gru_pytorch
from kernels.registration import operator


def passes(implementation: str) -> ModuleType | SimpleNamespace:
    """`reset_update`, `candidate`, `candidate_grad` and `reset_grad` of an implementation."""
    return conv_gru_pytorch if implementation == "pytorch" else _REGISTERED


def _kernels() -> ModuleType:
    """Imported on first use: Triton is optional."""
    from kernels.conv_gru import triton as conv_gru_triton

    return conv_gru_triton


@operator("gru_reset_update", mutates_args=("ru_BHW2C", "rh_BHWC"))
def gru_reset_update(
    gates_x_BHW3C: Tensor,
    gates_h_BHW2C: Tensor,
    h_BHWC: Tensor,
    ru_BHW2C: Tensor,
    rh_BHWC: Tensor,
) -> None:
    """r, u and r⊙h."""
    _kernels().reset_update(gates_x_BHW3C, gates_h_BHW2C, h_BHWC, ru_BHW2C, rh_BHWC)


@operator("gru_candidate", mutates_args=("ru_BHW2C", "h_BHWC", "c_BHWC", "y_BHWC"))
def gru_candidate(
    gates_x_BHW3C: Tensor,
    candidate_h_BHWC: Tensor | None,
    ru_BHW2C: Tensor,
    h_BHWC: Tensor,
    c_BHWC: Tensor | None,
    y_BHWC: Tensor,
) -> None:
    """c and the next h; r and u as well where there is no h yet."""
    _kernels().candidate(gates_x_BHW3C, candidate_h_BHWC, ru_BHW2C, h_BHWC, c_BHWC, y_BHWC)


@operator("gru_candidate_grad", mutates_args=("direct_BHWC", "dz_ru_BHW2C", "dz_c_BHWC"))
def gru_candidate_grad(
    dy_BHWC: Tensor,
    direct_BHWC: Tensor,
    dh_BHWC: Tensor | None,
    h_BHWC: Tensor | None,
    ru_BHW2C: Tensor,
    c_BHWC: Tensor,
    dz_ru_BHW2C: Tensor,
    dz_c_BHWC: Tensor,
) -> None:
    """The gradients before the nonlinearities of u and c."""
    _kernels().candidate_grad(
        dy_BHWC, direct_BHWC, dh_BHWC, h_BHWC, ru_BHW2C, c_BHWC, dz_ru_BHW2C, dz_c_BHWC
    )


@operator("gru_reset_grad", mutates_args=("dz_ru_BHW2C", "direct_BHWC", "rh_BHWC"))
def gru_reset_grad(
    drh_BHWC: Tensor,
    h_BHWC: Tensor,
    ru_BHW2C: Tensor,
    dz_ru_BHW2C: Tensor,
    direct_BHWC: Tensor,
    rh_BHWC: Tensor,
) -> None:
    """The gradient before the nonlinearity of r."""
    _kernels().reset_grad(drh_BHWC, h_BHWC, ru_BHW2C, dz_ru_BHW2C, direct_BHWC, rh_BHWC)


def _fake(*arguments: Any) -> None:
    """Nothing is returned, whatever is written."""


_REGISTERED = SimpleNamespace(
    reset_update=gru_reset_update,
    candidate=gru_candidate,
    candidate_grad=gru_candidate_grad,
    reset_grad=gru_reset_grad,
)
for _operator in vars(_REGISTERED).values():
    torch.library.register_fake(_operator, _fake)
