"""What the operators of spectral normalisation take: weights with their u and v, fp32 on a GPU."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.dispatch import triton_unsupported


def fp32_triton_unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton kernels that read fp32 weights cannot run."""
    return triton_unsupported(device, dtype) or not_fp32(dtype)


def not_fp32(dtype: torch.dtype) -> str | None:
    """Why kernels that read fp32 weights cannot run."""
    return None if dtype == torch.float32 else f"weights are {dtype}, not fp32"


def check_lists(weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor]) -> None:
    """Raises ValueError for lists that do not fit, as `power_iteration_` says."""
    if not len(weights) == len(us) == len(vs):
        raise ValueError(f"{len(weights)} weights, {len(us)} u and {len(vs)} v")
    if not weights:
        raise ValueError("a list of no weights")
    dtype, device = weights[0].dtype, weights[0].device
    for weight, u_R, v_K in zip(weights, us, vs, strict=True):
        check(weight, u_R, v_K)
        if weight.dtype != dtype or weight.device != device:
            raise ValueError("weights of one call must be of one dtype on one device")
        if not (u_R.is_contiguous() and v_K.is_contiguous()):
            raise ValueError("u and v of a list must be contiguous")


def check(weight: Tensor, u_R: Tensor, v_K: Tensor) -> None:
    """Raises ValueError for vectors that do not fit the weight and for an empty one."""
    # Every weight of every pass comes here: as few of PyTorch's attributes as will do.
    shape, dtype, device = weight.shape, weight.dtype, weight.device
    count = math.prod(shape)
    if len(shape) < 2 or count == 0:
        raise ValueError(f"a weight must be [R, ...] and not empty, not {tuple(shape)}")
    for name, vector, length in (("u", u_R, shape[0]), ("v", v_K, count // shape[0])):
        if vector.shape != (length,):
            raise ValueError(f"{name} must be [{length}], not {tuple(vector.shape)}")
        if vector.dtype != dtype or vector.device != device:
            raise ValueError(f"{name} must be of its weight's dtype and on its device")
