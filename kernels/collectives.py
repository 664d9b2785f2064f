"""Sums and means over the ranks of a process group, named by a string; "" is no group.

Names, because operators registered with PyTorch take no other form of a group.
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
    return _resolve(group).size() if group else 1


def sum_over(x: Tensor, group: str) -> Tensor:
    """The sum over ranks; without a gradient, traceable by torch.compile."""
    if not group:
        return x
    reduced = torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group)
    return torch.ops._c10d_functional.wait_tensor(reduced)


def mean_over(x: Tensor, group: str) -> Tensor:
    """The mean over ranks, differentiable: every rank's gradient is the sum of all ranks'."""
    if not group:
        return x
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(x, group=_resolve(group)) / num_ranks(group)


def _resolve(group: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(cast(Any, group))
