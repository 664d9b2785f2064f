"""The frame norm as PyTorch sees it: derivatives, fakes, compilation, saved memory, ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from csrc_forms import CPU_FORMS
from torch import Tensor
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import kernels

FORMS = ("pytorch", "triton", *CPU_FORMS)
OPS = torch.ops.sswgan


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("implementation", FORMS)
def test_operators_are_registered_right(implementation: str) -> None:
    x, dy = (randn(2, 3, 6, 4) for _ in range(2))
    gain, bias = randn(2, 1, 4), randn(2, 3, 4)
    mean, var = randn(3, 4), randn(3, 4).square()
    leaves = [v.requires_grad_() for v in (x, gain, bias, mean, var)]
    for own_statistics in (False,) if implementation == "triton" else (False, True):
        torch.library.opcheck(OPS.frame_norm.default, (*leaves, own_statistics, "", implementation))
    torch.library.opcheck(OPS.frame_moments.default, (x, implementation))
    arguments = [v.detach() for v in (dy, *leaves)]
    torch.library.opcheck(OPS.frame_norm_sums.default, (*arguments, implementation))
    terms = randn(2, 3, 4)
    torch.library.opcheck(OPS.frame_norm_dx.default, (*arguments, terms, implementation))


@pytest.mark.parametrize("implementation", ["reference", "pytorch"])
@pytest.mark.parametrize("given", [False, True], ids=["own", "given"])
def test_first_and_second_derivatives(implementation: str, given: bool) -> None:
    """In fp64, by finite differences, of everything."""
    double = torch.float64
    inputs = [randn(2, 2, 2, 2, 1, dtype=double), *randn(2, 2, 2, dtype=double)]
    if given:
        inputs += [randn(2, 2, dtype=double), randn(2, 2, dtype=double).square() + 0.1]

    def norm(x: Tensor, gain: Tensor, bias: Tensor, *fixed: Tensor) -> Tensor:
        statistics = (fixed[0], fixed[1]) if fixed else None
        return kernels.frame_norm(
            x, gain, bias, statistics=statistics, implementation=implementation
        )

    leaves = [v.requires_grad_() for v in inputs]
    assert torch.autograd.gradcheck(norm, leaves)
    assert torch.autograd.gradgradcheck(norm, leaves)


def test_statistics_derivatives() -> None:
    x = randn(2, 2, 2, 2, 1, dtype=torch.float64).requires_grad_()
    for implementation in ("reference", "pytorch"):

        def statistics(x: Tensor, implementation: str = implementation) -> tuple[Tensor, Tensor]:
            return kernels.frame_statistics(x, implementation=implementation)

        assert torch.autograd.gradcheck(statistics, x)
        assert torch.autograd.gradgradcheck(statistics, x)


def test_second_derivatives_of_the_forms_without_fp64() -> None:
    """They are the reference's: in fp32 equal up to the forward pass's own rounding."""
    x, gain, bias = randn(2, 2, 3, 4, 4), randn(2, 3), randn(2, 3)
    second = []
    for implementation in ("reference", *FORMS[1:]):
        leaves = [v.detach().requires_grad_() for v in (x, gain, bias)]
        y = kernels.frame_norm(*leaves, implementation=implementation)
        second.append(second_derivatives(y, leaves, 2 * y))
    assert all(g.abs().max() > 0.1 for g in second[0])
    for form in second[1:]:
        for got, expected in zip(form, second[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_the_backward_operators_refuse_derivatives() -> None:
    x, dy = randn(1, 1, 4, 2).requires_grad_(), randn(1, 1, 4, 2)
    scale, statistic = torch.ones(1, 1, 2), torch.ones(1, 2)
    arguments = dy, x, scale, scale, statistic, statistic, None, "pytorch"
    with pytest.raises(RuntimeError, match="frame_norm_dx has no derivative"):
        OPS.frame_norm_dx(*arguments)
    with torch.no_grad():
        assert not OPS.frame_norm_dx(*arguments).requires_grad


@pytest.mark.parametrize("implementation", ["reference", *FORMS])
def test_compiled_and_checkpointed_equal_eager(implementation: str) -> None:
    x, gain, bias = randn(2, 3, 4, 5, 5), randn(2, 4), randn(2, 4)

    def norm(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        return kernels.frame_norm(x, gain, bias, implementation=implementation)

    def rerun(*inputs: Tensor) -> Tensor:
        result: Tensor = checkpoint(norm, *inputs, use_reentrant=False)
        return result

    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    results = []
    for function in (norm, compiled, rerun):
        leaves = [v.detach().requires_grad_() for v in (x, gain, bias)]
        y = function(*leaves)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, x)])
    for other in results[1:]:
        assert all(torch.equal(got, value) for got, value in zip(other, results[0], strict=True))


def saved_bytes(*arguments: Any, **options: Any) -> int:
    """Bytes of the distinct storages that a call keeps for its backward pass."""
    storages: dict[int, int] = {}

    def pack(v: Tensor) -> Tensor:
        storage = v.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
        kept.append(v)  # alive, so that no storage takes another's place
        return v

    kept: list[Tensor] = []
    with saved_tensors_hooks(pack, lambda v: v):
        kernels.frame_norm(*arguments, **options)
    return sum(storages.values())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_only_x_and_the_statistics_are_saved(device: str) -> None:
    """At stage 2's largest norm (meta): 128 channels of 12 frames of 128x128, bf16."""
    size = (4, 12, 128, 128, 128) if device == "meta" else (4, 3, 8, 6, 6)
    B, T, C, H, W = size
    x = torch.zeros(B, T, H, W, C, device=device, dtype=torch.bfloat16).permute(0, 1, 4, 2, 3)
    gain, bias = (torch.ones(B, C, device=device).requires_grad_() for _ in range(2))
    least = x.numel() * 2 + 2 * T * C * 4 + 2 * B * C * 4
    x = x.requires_grad_()
    assert saved_bytes(x, gain, bias) == least
    assert saved_bytes(x, gain, bias, implementation="reference") > 3 * least


@pytest.mark.parametrize("implementation", FORMS)
def test_meta_tensors_have_the_results_layout(implementation: str) -> None:
    x = torch.empty(2, 3, 4, 5, 6, device="meta", dtype=torch.bfloat16).requires_grad_()
    gain = torch.empty(2, 4, device="meta").requires_grad_()
    y = kernels.frame_norm(x, gain, gain, implementation=implementation)
    assert y.permute(0, 1, 3, 4, 2).is_contiguous()
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    mean, var = kernels.frame_statistics(x, implementation=implementation)
    assert mean.shape == var.shape == (3, 4)
    assert mean.dtype == var.dtype == torch.float32
    dx, dgain = torch.autograd.grad(y, (x, gain), torch.empty_like(y))
    assert (dx.shape, dx.dtype) == (x.shape, x.dtype)
    assert (dgain.shape, dgain.dtype) == (gain.shape, gain.dtype)


def second_derivatives(y: Tensor, leaves: list[Tensor], dy: Tensor) -> list[Tensor]:
    """Of the sum of squares of all gradients."""
    grads = torch.autograd.grad(y, leaves, dy, create_graph=True)
    total = torch.stack([g.square().sum() for g in grads]).sum()
    return list(torch.autograd.grad(total, leaves, allow_unused=False))


class AllReduces(TorchDispatchMode):
    """Notes the shape and dtype of whatever is summed over ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[tuple[int, ...], torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            assert func is torch.ops._c10d_functional.all_reduce.default
            self.seen.append((tuple(args[0].shape), args[0].dtype))
        return func(*args, **(kwargs or {}))


def _compare_ranks(rank: int, store: Path) -> None:
    """Each of two ranks holds half a batch; together they must equal the whole, by one all-reduce
    of two numbers per frame and channel forward and one backward."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    x = randn(4, 2, 3, 5, 5) + torch.arange(4.0)[:, None, None, None, None]
    gain, bias, dy = randn(4, 3), randn(4, 3), randn(4, 2, 3, 5, 5)
    whole = [v.detach().requires_grad_() for v in (x, gain, bias)]
    y = kernels.frame_norm(*whole, implementation="reference")
    expected = [y.detach(), *torch.autograd.grad(y, whole, dy, retain_graph=True)]
    expected += second_derivatives(y, whole, dy)
    mine = slice(2 * rank, 2 * rank + 2)
    for implementation in ("reference", *FORMS):
        half = [v[mine].detach().requires_grad_() for v in (x, gain, bias)]
        y = kernels.frame_norm(*half, group=dist.group.WORLD, implementation=implementation)
        got = [y.detach(), *torch.autograd.grad(y, half, dy[mine], retain_graph=True)]
        got += second_derivatives(y, half, dy[mine])
        for value, full in zip(got, expected, strict=True):
            torch.testing.assert_close(value, full[mine], rtol=1e-4, atol=1e-4)

    one_frame = x[mine, :1]
    for implementation in FORMS:
        half = [v.detach().requires_grad_() for v in (one_frame, gain[mine], bias[mine])]
        with AllReduces() as forward:
            y = kernels.frame_norm(*half, group=dist.group.WORLD, implementation=implementation)
        with AllReduces() as backward:
            torch.autograd.grad(y, half, dy[mine, :1])
        # Mean and second moment, in fp64 because they cancel; and the gain's S1 and S2.
        assert forward.seen == [((2, 1, 3), torch.float64)], implementation
        assert backward.seen == [((2, 1, 3), torch.float32)], implementation

    compiled = torch.compile(kernels.frame_norm, fullgraph=True, backend="aot_eager")
    half = [v[mine].detach().requires_grad_() for v in (x, gain, bias)]
    y = compiled(*half, group=dist.group.WORLD)
    got = [y.detach(), *torch.autograd.grad(y, half, dy[mine])]
    for value, full in zip(got, expected[:4], strict=True):
        torch.testing.assert_close(value, full[mine], rtol=1e-4, atol=1e-4)
    dist.destroy_process_group()


def test_statistics_of_two_ranks_are_one_batch(tmp_path: Path) -> None:
    mp.spawn(_compare_ranks, (tmp_path / "store",), nprocs=2)


def test_statistics_and_a_group_exclude_each_other() -> None:
    class Group:
        """Any group: it is refused before it is used."""

    x, scale, statistic = randn(1, 1, 2, 2, 2), randn(1, 2), randn(1, 2)
    with pytest.raises(ValueError, match="not synchronised"):
        kernels.frame_norm(x, scale, scale, statistics=(statistic, statistic), group=Group())  # type: ignore[arg-type]
