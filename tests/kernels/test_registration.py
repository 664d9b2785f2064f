"""How a registered operator is called."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from kernels import registration


@pytest.mark.parametrize("is_list", [False, True], ids=["tensor", "list"])
def test_operators_run_on_their_tensors_gpu(monkeypatch: pytest.MonkeyPatch, is_list: bool) -> None:
    """Triton would launch on the current one."""
    entered: list[torch.device] = []

    def enter(device: torch.device) -> AbstractContextManager[None]:
        entered.append(device)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", enter)
    for index in (0, 1):
        tensor: Any = Mock(spec=Tensor, is_cuda=True, device=torch.device("cuda", index))
        with registration._on_their_device([[tensor] if is_list else tensor, 1]):
            pass
    with registration._on_their_device([torch.ones(1)]):
        pass
    assert entered == [torch.device("cuda", 1)]
