"""The C++ passes of the frame norm, beyond what every implementation is tested for."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels.common import csrc_libraries
from kernels.dispatch import meta_as
from kernels.frame_norm import cpu as frame_norm_cpu
from kernels.frame_norm.operands import EPSILON, NormOperands

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
    dy, operands = tensors[0], NormOperands(*tensors[1:])
    sums, weighted = frame_norm_cpu.sums(dy, operands)
    return [
        *frame_norm_cpu.moments(operands.x_BTSC),
        frame_norm_cpu.normalize(operands),
        sums,
        frame_norm_cpu.dx(dy, operands, weighted),
    ]


class OperatorsCalled(TorchDispatchMode):
    """The names of what is called, below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.add(str(operator.overloadpacket))
        return operator(*args, **kwargs or {})


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


@pytest.mark.parametrize("mean", [0, 1000])
def test_sums_over_a_long_frame_lose_no_digits(mean: float) -> None:
    """262,144 pixels: fp32 sums are of 64, a block, and eight roundings of their size off at most.

    That is √64 where values have mean 0, and 64 for x less one of its values, whose mean is not 0.
    Errors of blocks have either sign. Means and variances, whose blocks come together in fp64, are
    rounded once more; one fp32 sum over all errs by tens of times as much. The gradient's sums
    are rounded at every block, half a unit of √S.
    """
    random = torch.Generator().manual_seed(0)
    S, rounding = 512 * 512, 2**-24
    noise, dy = torch.randn(2, 1, 1, S, 3, generator=random)
    x = mean + noise
    exact = x.double()
    true_mean, true_var = exact.mean(2)[0], exact.var(2, correction=0)[0]
    got_mean, got_var = frame_norm_cpu.moments(x)
    of_blocks = 8 * rounding * 64**0.5 * (S / 64) ** 0.5
    assert (got_mean - true_mean).abs().max() <= 8 * of_blocks / S + rounding * mean
    assert (got_var - true_var).abs().max() <= of_blocks / S + 2 * rounding

    one = torch.ones(1, 1, 3)
    open_relu = 100 * one  # whatever x is
    operands = NormOperands(x, one, open_relu, got_mean, got_var)
    (sums, products), _ = frame_norm_cpu.sums(dy, operands)
    normal = (exact - got_mean.double()) * (got_var.double() + EPSILON).rsqrt()
    for got, true in ((sums, dy.double()), (products, dy.double() * normal)):
        limit = of_blocks + rounding * S**0.5 * (S / 64) ** 0.5
        assert (got[0] - true.sum(2)[0]).abs().max() <= limit


def test_the_compiler_left_no_sum_scalar(threads: Callable[[int], None]) -> None:
    """Both passes read x once, `sums` dy too: 1.2 times the time, or 20 where a change undid that.

    The least of seven runs each, in turns: what else runs here makes a pass slower, never faster.
    """
    threads(1)
    dy, x, gain, bias, mean, var = arguments((2, 12, 1024, 32))
    calls: tuple[Callable[[], Any], ...] = (
        lambda: frame_norm_cpu.moments(x),
        lambda: frame_norm_cpu.sums(dy, NormOperands(x, gain, bias, mean, var)),
    )
    seconds: list[list[float]] = [[], []]
    for _ in range(7):
        for call, taken in zip(calls, seconds, strict=True):
            started = time.perf_counter()
            call()
            taken.append(time.perf_counter() - started)
    least = [min(taken) for taken in seconds]
    assert least[1] < 7 * least[0]


def test_it_runs_by_itself_where_it_can() -> None:
    def chosen(device: str, dtype: torch.dtype) -> str:
        return kernels.implementations(device, dtype)["frame_norm"].implementation

    dtypes = torch.float32, torch.bfloat16, torch.float16, torch.float64
    assert [chosen("cpu", dtype) for dtype in dtypes] == ["cpu", "cpu", "cpu", "pytorch"]
    assert chosen("meta", torch.float32) == "pytorch"


def test_an_older_library_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    assert frame_norm_cpu._outdated() is None
    older = (*frame_norm_cpu._TAKEN[:5], "residual", *frame_norm_cpu._TAKEN[5:])
    monkeypatch.setattr(frame_norm_cpu, "_TAKEN", older)
    assert frame_norm_cpu._outdated() == "csrc/ was built from other sources: run make"


def test_what_is_planned_for_a_cpu_runs_it_on_meta_tensors() -> None:
    """Forward and backward, and results are as on a CPU."""
    _, x, gain, bias, *_ = arguments((2, 3, 20, 8), torch.bfloat16)
    results = []
    for device in ("meta", "cpu"):
        leaf = x.transpose(2, 3)[..., None].to(device).requires_grad_()
        scaling = gain[:, 0].to(device), bias[:, 0].to(device)
        with meta_as("cpu"), OperatorsCalled() as called:
            y = kernels.frame_norm(leaf, *scaling)
            [dx] = torch.autograd.grad(y, leaf, torch.ones_like(y))
        results.append([y, dx])
        # `normalize`, which autograd follows, is called by an operator of ours or is its fake.
        assert {f"sswgan_cpu.{name}" for name in ("moments", "sums", "dx")} < called.names
    for on_meta, on_cpu in zip(*results, strict=True):
        assert on_meta.device.type == "meta"
        for fact in ("shape", "dtype"):
            assert getattr(on_meta, fact) == getattr(on_cpu, fact)
        assert on_meta.stride() == on_cpu.stride()


def test_the_library_refuses_what_it_would_misread() -> None:
    _, x, gain, bias, mean, var = arguments((2, 3, 5, 4))
    operators = torch.ops.sswgan_cpu
    rest = 1e-4, torch.empty_like(x)
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
        operators.normalize(x, gain, bias, mean, var, 1e-4, x[:1].clone())
