"""Convolutions in parts of the batch, as with more values than cuDNN indexes: the limit is lowered.

The same y and gradients, and no convolution sees a tensor beyond the limit. Inputs are small whole
numbers, of which all sums are exact: oneDNN sums in another order where a batch is another.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from convolution_sizes import ConvolutionSizes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels.common import large_batches
from kernels.convolution.folding import Folded, upsampling_kernel
from kernels.frame_norm import EPSILON

B, T, I, O = 5, 3, 4, 6  # noqa: E741
SIZE = 8, 6


def whole_numbers(*shape: int) -> Tensor:
    return torch.randint(-3, 4, shape).float().requires_grad_()


def weight(*taps: int) -> Tensor:
    return whole_numbers(O, *taps, I)


def video() -> Tensor:
    return whole_numbers(B, T, *SIZE, I).detach().permute(0, 1, 4, 2, 3).requires_grad_()


def normalized(x: Tensor) -> kernels.Normalized:
    """By statistics that change nothing."""
    statistics = torch.zeros(T, I), torch.full((T, I), 1 - EPSILON)
    return kernels.Normalized(x, torch.ones(B, I), torch.zeros(B, I), statistics)


def pair_of_halves() -> list[Tensor]:
    return [weight(3), whole_numbers(O, 3, 3, O)]


def gru_parameters() -> list[Tensor]:
    return [*(whole_numbers(I, 3, 3, 2 * I) for _ in range(3)), *(whole_numbers(I),) * 3]


Run = Callable[..., Tensor]
# What runs, its parameters. A norm in front makes it our autograd Function's, none PyTorch's.
OPERATORS: dict[str, tuple[Run, Callable[[], list[Tensor]]]] = {
    "conv2d": (kernels.conv2d, lambda: [weight(3, 3), whole_numbers(O)]),
    "conv2d, normalized": (
        lambda x, w: kernels.conv2d(normalized(x), w).video,
        lambda: [weight(3, 3)],
    ),
    "conv3d": (kernels.conv3d, lambda: [weight(3, 3, 3)]),
    "separable": (
        lambda x, t, s: kernels.separable_conv3d(normalized(x), t, s).video,
        pair_of_halves,
    ),
    "upsample": (
        lambda x, w: (
            kernels.upsample_conv(normalized(x), Folded(upsampling_kernel(w), "upsampling")).video
        ),
        lambda: [weight(3, 3)],
    ),
    "pool2d": (
        lambda x, w: kernels.conv_pool2d(normalized(x).value(), w),
        lambda: [weight(3, 3)],
    ),
    "pool3d": (
        lambda x, w: kernels.conv_pool3d(x, w),
        lambda: [weight(3, 3, 3)],
    ),
    "conv_gru": (kernels.conv_gru, gru_parameters),
}


def run(name: str) -> tuple[list[Tensor], list[int]]:
    """y and all gradients, and the sizes of what convolutions saw."""
    torch.manual_seed(0)
    operator, make = OPERATORS[name]
    x, parameters = video(), make()
    with ConvolutionSizes() as sizes:
        y = operator(x, *parameters)
        grads = torch.autograd.grad(y, [x, *parameters], whole_numbers(*y.shape).detach())
    return [y.detach(), *grads], sizes.largest


@pytest.mark.parametrize("name", OPERATORS)
def test_parts_are_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results, sizes = run(name)
    limit = max(sizes) * 2 // 5  # two samples of five
    monkeypatch.setattr(large_batches, "MOST_VALUES", limit)
    results_of_parts, sizes_of_parts = run(name)
    assert max(sizes_of_parts) <= limit < max(sizes)
    assert len(sizes_of_parts) > len(sizes)
    # Gates are no whole numbers. Their gradients grow over time, so errors are of the largest's.
    error = 1e-5 if name == "conv_gru" else 0.0
    for whole, parts in zip(results, results_of_parts, strict=True):
        torch.testing.assert_close(parts, whole, rtol=0, atol=error * float(whole.abs().max()))
    assert results[0].stride() == results_of_parts[0].stride()


def test_without_gradients_parts_go_into_one_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, w = video().detach(), weight(3, 3).detach()
    whole = kernels.conv2d(x, w)
    monkeypatch.setattr(large_batches, "MOST_VALUES", whole[0, 0].numel() * 4)
    concatenated = []

    class Cats(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            concatenated.append(func is torch.ops.aten.cat.default)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Cats(), ConvolutionSizes() as sizes:
        parts = kernels.conv2d(x, w)
    assert len(sizes.largest) == 4  # 15 frames by four
    assert not any(concatenated)
    assert torch.equal(whole, parts)
    assert whole.stride() == parts.stride()


def test_sums_over_parts_are_taken_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16, 256 + 1 is 256: fifteen ones after a 256 would be lost."""

    def ones(dy: Tensor, x: Tensor) -> large_batches.Gradients:
        return None, dy.sum().to(torch.bfloat16).reshape(1), None

    dy = torch.ones(16, 1, 1, 1, dtype=torch.bfloat16)
    dy[0] = 256
    monkeypatch.setattr(large_batches, "MOST_VALUES", 1)
    _, total, _ = large_batches.gradients_in_parts(ones, dy, torch.ones_like(dy))
    assert total is not None
    assert total.dtype == torch.bfloat16
    assert total.item() == 272  # 271 in bf16


def test_a_sample_beyond_the_limit_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_batches, "MOST_VALUES", 7)
    x, w = video().detach(), weight(3, 3).detach()
    with ConvolutionSizes() as sizes:
        kernels.conv2d(x, w)
    assert len(sizes.largest) == B * T
