"""The C++ passes of the frame norm, beyond what every implementation is tested for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from kernels import csrc_libraries, frame_norm_cpu
from kernels.implementation import meta_as

pytestmark = pytest.mark.skipif(
    csrc_libraries.unavailable(csrc_libraries.CPU) is not None, reason="csrc/ is not built"
)


def arguments(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, ...]:
    """dy, x, gain, bias, mean and variance."""
    torch.manual_seed(0)
    B, T, _, C = shape
    x, dy = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    gain, bias = (torch.randn(B, 1, C, device=device) for _ in range(2))
    return dy, x, gain, bias, torch.randn(T, C, device=device), torch.rand(T, C, device=device)


def all_passes(*tensors: Tensor) -> list[Tensor]:
    dy, x, gain, bias, mean, var = tensors
    scaling = gain, bias, mean, var
    sums, weighted = frame_norm_cpu.sums(dy, x, *scaling, 1e-4, True)
    return [
        *frame_norm_cpu.moments(x),
        frame_norm_cpu.normalize(x, *scaling, None, 1e-4, True),
        sums,
        frame_norm_cpu.dx(dy, x, *scaling, weighted, 1e-4, True),
    ]


@pytest.fixture
def threads() -> Any:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_bits_do_not_depend_on_the_number_of_threads(threads: Callable[[int], None]) -> None:
    """Frames enough for three threads."""
    tensors = arguments((4, 6, 333, 32))
    results = []
    for number in (1, 3):
        threads(number)
        results.append(all_passes(*tensors))
    assert all(torch.equal(one, three) for one, three in zip(*results, strict=True))


def test_statistics_of_a_long_frame_far_from_zero() -> None:
    """One sum over all pixels, or mean squares less squared means, would lose digits."""
    x = 1000 + torch.randn(1, 1, 512 * 512, 3, generator=torch.Generator().manual_seed(0))
    mean, var = frame_norm_cpu.moments(x)
    exact = x.double()
    torch.testing.assert_close(mean[0].double(), exact.mean((0, 1, 2)), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        var[0].double(), exact.var((0, 1, 2), correction=0), rtol=1e-4, atol=0
    )


def test_it_runs_by_itself_where_it_can() -> None:
    def chosen(device: str, dtype: torch.dtype) -> str:
        return kernels.implementations(device, dtype)["frame_norm"].implementation

    dtypes = torch.float32, torch.bfloat16, torch.float16, torch.float64
    assert [chosen("cpu", dtype) for dtype in dtypes] == ["cpu", "cpu", "cpu", "pytorch"]
    assert chosen("meta", torch.float32) == "pytorch"


def test_on_meta_tensors_it_allocates_what_it_does_on_a_cpu() -> None:
    shape = (2, 3, 20, 8)
    with meta_as("cpu"):
        got = all_passes(*arguments(shape, torch.bfloat16, "meta"))
    for on_meta, on_cpu in zip(got, all_passes(*arguments(shape, torch.bfloat16)), strict=True):
        assert (on_meta.shape, on_meta.dtype) == (on_cpu.shape, on_cpu.dtype)
        assert on_meta.device.type == "meta"


def test_the_library_refuses_what_it_would_misread() -> None:
    _, x, gain, bias, mean, var = arguments((2, 3, 5, 4))
    operators = torch.ops.sswgan_cpu
    rest = None, 1e-4, True, torch.empty_like(x)
    for wrong, said in (
        ((x.double(), gain, bias, mean, var), "x is neither fp32, bf16 nor fp16"),
        ((x[:, :, :3], gain, bias, mean, var), "x is not contiguous"),
        ((x, gain[:1], bias, mean, var), "gain is of the wrong size"),
        ((x, gain.expand(2, 2, 4), bias, mean, var), "gain is neither of 1 nor of all frames"),
        ((x, gain, bias.double(), mean, var), "bias has the wrong dtype"),
        ((x, gain, bias, mean[:2], var), "mean is of the wrong size"),
    ):
        with pytest.raises(RuntimeError, match=said):
            operators.normalize(*wrong, *rest)
    with pytest.raises(RuntimeError, match="the result is of the wrong size"):
        operators.normalize(x, gain, bias, mean, var, None, 1e-4, True, x[:1].clone())
