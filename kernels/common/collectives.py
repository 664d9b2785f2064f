"""Sums and means over the ranks of a process group, named by a string; "" is no group.

Names, because operators registered with PyTorch take a group in no other way.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch import distributed as dist


def group_name(group: dist.ProcessGroup | None) -> str:
    """The name of a group; "" for none and for one of a single rank."""
    return "" if group is None or group.size() == 1 else group.group_name


def num_ranks(group: str) -> int:
    """Ranks of a group, 1 without one."""
    return dist.distributed_c10d._get_group_size_by_name(cast(Any, group)) if group else 1


def sum_over(x: Tensor, group: str) -> Tensor:
    """The sum over ranks, without a gradient."""
    if not group:
        return x
    reduced = torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group)
    return torch.ops._c10d_functional.wait_tensor(reduced)


def mean_over(x: Tensor, group: str) -> Tensor:
    """The mean over ranks, differentiable to any order."""
    return _Sum.apply(x, group) / num_ranks(group) if group else x


class _Sum(torch.autograd.Function):
    """What every rank sees of x is what every rank's loss depends on: gradients are summed too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return sum_over(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(grads[0], ctx.group), None
