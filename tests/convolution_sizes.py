"""How large the tensors are that convolutions see."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class ConvolutionSizes(TorchDispatchMode):
    """The largest tensor of every convolution and of every gradient of one."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if "convolution" in func.__name__:
            videos = [v for v in tree_leaves((args[:2], result)) if isinstance(v, Tensor)]
            self.largest.append(max(v.numel() for v in videos))
        return result
