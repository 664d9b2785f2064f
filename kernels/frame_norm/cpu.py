"""The passes of `kernels.frame_norm` in C++ for a CPU: csrc/, where it has been built.

Names, arguments and results are those of `pytorch.py`; x is fp32, fp16 or bf16. Every pass reads x
once. Of values of x's size, forward and backward read and write eight; the operators of
`pytorch.py` 32.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.common import csrc_libraries
from kernels.frame_norm.operands import EPSILON, NormOperands

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_OPERATORS: Any = torch.ops.sswgan_cpu
_TAKEN = ("x", "gain", "bias", "mean", "var", "eps", "y")
"""By `normalize`, of which older libraries took more."""


def _outdated() -> str | None:
    """Why a library that is there cannot be called; None where it can."""
    taken = tuple(argument.name for argument in _OPERATORS.normalize.default._schema.arguments)
    return None if taken == _TAKEN else "csrc/ was built from other sources: run make"


# Looked for at once: a compiler that traces an operator's choice could not follow.
_UNAVAILABLE = csrc_libraries.unavailable(csrc_libraries.CPU) or _outdated()


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why it cannot run; None where it can."""
    if device.type not in ("cpu", "meta"):
        return f"tensors are on {device.type}, not on the CPU"
    if dtype not in _DTYPES:
        return f"{str(dtype).removeprefix('torch.')} is not among fp32, fp16 and bf16"
    return _UNAVAILABLE


def not_preferred(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why "auto" does not run it where it can."""
    return None if device.type == "cpu" else f"tensors are on {device.type}, not on the CPU"


def moments(x_BTSC: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every (time step, channel), each [T, C]."""
    mean_TC = x_BTSC.new_empty(x_BTSC.shape[1], x_BTSC.shape[3], dtype=torch.float32)
    var_TC = torch.empty_like(mean_TC)
    _OPERATORS.moments(x_BTSC, mean_TC, var_TC)
    return mean_TC, var_TC


def normalize(operands: NormOperands) -> Tensor:
    """y in the dtype of x."""
    y_BTSC = torch.empty_like(operands.x_BTSC)
    _OPERATORS.normalize(*_as_taken(operands), EPSILON, y_BTSC)
    return y_BTSC


def sums(dy_BTSC: Tensor, operands: NormOperands) -> tuple[Tensor, Tensor]:
    """(S1, S2) as [2, B, T, C], and Σ_b gain·(S1, S2) as [2, T, C]."""
    x_BTSC = operands.x_BTSC
    B, T, _, C = x_BTSC.shape
    sums_2BTC = x_BTSC.new_empty(2, B, T, C, dtype=torch.float32)
    _OPERATORS.sums(dy_BTSC.to(x_BTSC.dtype), *_as_taken(operands), EPSILON, sums_2BTC)
    return sums_2BTC, (sums_2BTC * operands.gain_BtC).sum(1)


def dx(dy_BTSC: Tensor, operands: NormOperands, terms_2TC: Tensor | None) -> Tensor:
    """dx in the dtype of x; `terms` None: the statistics do not depend on x."""
    x_BTSC = operands.x_BTSC
    dx_BTSC = torch.empty_like(x_BTSC)
    terms = None if terms_2TC is None else terms_2TC.contiguous()
    _OPERATORS.dx(dy_BTSC.to(x_BTSC.dtype), *_as_taken(operands), terms, EPSILON, dx_BTSC)
    return dx_BTSC


def _as_taken(operands: NormOperands) -> NormOperands:
    """As the library takes them: all but x in fp32."""
    x_BTSC, *rest = operands
    return NormOperands(x_BTSC, *(tensor.to(torch.float32).contiguous() for tensor in rest))


def _nothing(*arguments: Any) -> None:
    """On meta tensors: all that the operators do is to write what they are given."""


if _UNAVAILABLE is None:
    for _name in ("moments", "normalize", "sums", "dx"):
        torch.library.register_fake(f"sswgan_cpu::{_name}", _nothing)
