"""Stand-ins for a cluster in a rehearsal: a process group of one, and tensors without values.

DeepSpeed and the trainer are the real ones. They are rank 0 of `world_size` in a process group
whose collectives return at once (PyTorch's FakeProcessGroup). Their device is "meta", where a
tensor has a shape and no memory.
"""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.runtime.zero import linear
from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator
from torch import Tensor
from torch.optim import adam
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.trainer.ranks import Ranks, leave_out_inference_collectives

META = torch.device("meta")
_MOST_NUMBERS_READ = 256
"""A step's measures, which it reads in one copy, are fewer."""


class MetaAccelerator(CPU_Accelerator):
    """Tells DeepSpeed, which asks its accelerator for the device, that it is the meta device."""

    def device_name(self, device_index: Any = None) -> str:
        """For `torch.device(...)`."""
        return META.type

    def current_device_name(self) -> str:
        """For `device=`."""
        return META.type

    def device(self, device_index: Any = None) -> torch.device:
        """An engine's device."""
        return META

    def on_accelerator(self, tensor: Tensor) -> bool:
        """Whether DeepSpeed must move it."""
        return tensor.is_meta


class ShapesOnly(TorchDispatchMode):
    """Lets a host read single values of the meta device: every number is 1, every flag False.

    Copies to the host stay on the meta device; with `small_copies`, ones of few values are made.
    Counts operators and collectives.
    """

    def __init__(self, *, small_copies: bool = False) -> None:
        super().__init__()
        self._small_copies = small_copies
        self.num_operators = 0
        self.collectives: Counter[str] = Counter()
        self.collective_bytes: Counter[str] = Counter()
        """Of the tensors given to a kind of collective, inputs and outputs."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run `func`, or answer for it."""
        kwargs = dict(kwargs or {})
        self.note(func, args, kwargs)
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return _one(args[0].dtype)
        if func is torch.ops.aten._to_copy.default and args[0].is_meta:
            to = kwargs.get("device")
            if to is not None and torch.device(to).type == "cpu":
                if self._small_copies and args[0].numel() <= _MOST_NUMBERS_READ:
                    return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
                kwargs["device"] = META
        if func is torch.ops.aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            return args[0]
        return func(*args, **kwargs)

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count an operator that is about to run. A subclass may count more of it."""
        self.num_operators += 1
        self._count_collective(func, args)

    def _count_collective(self, func: Any, args: tuple[Any, ...]) -> None:
        name = func._schema.name.split("::")[1].strip("_")
        if func.namespace == "_c10d_functional":  # used by kernels/common/collectives.py only
            name = f"{name} of norm statistics"
        elif func.namespace != "c10d":
            return
        if name.startswith(("wait", "barrier")):
            return
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        self.collectives[name] += 1
        self.collective_bytes[name] += sum(tensor.nbytes for tensor in tensors)


def _one(dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return False  # DeepSpeed's question whether a gradient overflowed
    return 1.0 if dtype.is_floating_point else 1


@contextlib.contextmanager
def fake_job(world_size: int) -> Iterator[Ranks]:
    """This process as rank 0 of `world_size`; no other exists.

    For a process of its own: what DeepSpeed once did to PyTorch for ZeRO-3 (`F.linear`) stays.
    """
    before = get_accelerator()
    with contextlib.ExitStack() as stack:
        for name, value in (("RANK", 0), ("WORLD_SIZE", world_size), ("LOCAL_RANK", 0)):
            stack.enter_context(_environment(name, str(value)))
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
        stack.callback(dist.destroy_process_group)
        set_accelerator(MetaAccelerator())
        stack.callback(set_accelerator, before)
        # ZeRO-3's linear layer asks about autocasting, which knows no meta device.
        stack.enter_context(replaced(linear, "get_accelerator", lambda: before))
        # PyTorch's fused Adam has a meta implementation, but its list of devices omits it.
        stack.enter_context(replaced(adam, "_device_dtype_check_for_fused", lambda *options: None))
        # ZeRO-3 compares its order of modules with rank 0's numbers: there are none to read.
        stack.enter_context(
            replaced(coordinator, "assert_ints_same_as_other_ranks", lambda ints: None)
        )
        leave_out_inference_collectives()
        deepspeed.init_distributed(dist_backend="fake", auto_mpi_discovery=False, verbose=False)
        yield Ranks(rank=0, world_size=world_size, local_rank=0, device=META)


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another value for an attribute."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before
