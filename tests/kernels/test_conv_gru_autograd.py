"""The ConvGRU as PyTorch sees it: derivatives, fakes, compilation, saved memory, FLOPs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import kernels

FORMS = ("pytorch", "triton")
OPS = torch.ops.sswgan
CONSTANT = pytest.mark.parametrize("constant", [False, True], ids=["moving", "constant"])


def draw(
    shape: tuple[int, ...], *, constant: bool = False, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """x as it is before it is expanded, weights, biases; all want gradients."""
    B, T, C, H, W = shape
    weights = [torch.randn(C, 3, 3, 2 * C) / (18 * C) ** 0.5 for _ in range(3)]
    tensors = [torch.randn(B, 1 if constant else T, C, H, W), *weights, *torch.randn(3, C)]
    return [v.to(dtype).requires_grad_() for v in tensors]


def function(implementation: str, num_frames: int = 3) -> Callable[..., Tensor]:
    """Of the tensors of `draw`."""

    def gru(x: Tensor, *parameters: Tensor) -> Tensor:
        x = x.expand(-1, num_frames, -1, -1, -1)
        return kernels.conv_gru(x, *parameters, implementation=implementation)

    return gru


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_operators_are_registered_right() -> None:
    """Forms with all their arguments and with as few as may be."""

    def frame(channels: int) -> Tensor:
        return torch.randn(2, 2, 3, channels)

    h, c, y, dy, direct, dh = (frame(4) for _ in range(6))
    ru, dz_ru = frame(8).sigmoid(), frame(8)
    video = torch.randn(2, 3, 2, 3, 4)
    checks: list[tuple[Any, tuple[Any, ...]]] = [
        (OPS.gru_reset_update, (frame(12), frame(8), h, ru, y)),
        (OPS.gru_candidate, (frame(12), frame(4), ru, h, c, video[:, 1])),
        (OPS.gru_candidate, (frame(12), None, ru, h, None, y)),
        (OPS.gru_candidate_grad, (video[:, 2], direct, dh, h, ru, c, dz_ru, y)),
        (OPS.gru_candidate_grad, (dy, direct, None, None, ru, c, dz_ru, y)),
        (OPS.gru_reset_grad, (dh, h, ru, dz_ru, direct, y)),
    ]
    for operator, arguments in checks:
        torch.library.opcheck(operator.default, arguments)


@CONSTANT
@pytest.mark.parametrize("implementation", ["reference", "pytorch"])
def test_first_and_second_derivatives(implementation: str, constant: bool) -> None:
    """In fp64, by finite differences, of everything."""
    leaves = draw((1, 3, 1, 2, 2), constant=constant, dtype=torch.float64)
    assert torch.autograd.gradcheck(function(implementation), leaves)
    assert torch.autograd.gradgradcheck(function(implementation), leaves)


@CONSTANT
def test_second_derivatives_of_the_triton_form(constant: bool) -> None:
    """They are the reference's: in fp32 equal up to the forward pass's own rounding."""
    leaves, second = draw((2, 3, 3, 4, 4), constant=constant), []
    for implementation in ("reference", "triton"):
        y = function(implementation)(*leaves)
        grads = torch.autograd.grad(y, leaves, 2 * y, create_graph=True)
        total = torch.stack([g.square().sum() for g in grads]).sum()
        second.append(torch.autograd.grad(total, leaves))
    assert all(g.abs().max() > 0.1 for g in second[0])
    for got, expected in zip(second[1], second[0], strict=True):
        # Sums of some thousand values, each wrong by 2⁻²⁴, of either sign.
        error, largest = (got - expected).abs().max(), expected.abs().max()
        assert error <= 64 * 2**-24 * largest


@CONSTANT
@pytest.mark.parametrize("implementation", FORMS)
def test_checkpointed_and_without_gradients_equal_eager(
    implementation: str, constant: bool
) -> None:
    gru, leaves = function(implementation), draw((2, 3, 4, 5, 5), constant=constant)
    y, dy = gru(*leaves), torch.randn(2, 3, 4, 5, 5)
    again = checkpoint(gru, *leaves, use_reentrant=False)
    with torch.no_grad():
        assert torch.equal(gru(*leaves), y)
    assert torch.equal(again, y)
    expected = torch.autograd.grad(y, leaves, dy)
    got = torch.autograd.grad(again, leaves, dy)
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    ("implementation", "constant"), [("pytorch", False), ("pytorch", True), ("triton", True)]
)
def test_compiled_equals_eager(implementation: str, constant: bool) -> None:
    """In one graph. Few of the combinations: each takes seconds."""
    gru, leaves = function(implementation), draw((2, 3, 4, 5, 5), constant=constant)
    torch.compiler.reset()
    compiled = torch.compile(gru, fullgraph=True, backend="aot_eager")
    y, other, dy = gru(*leaves), compiled(*leaves), torch.randn(2, 3, 4, 5, 5)
    assert torch.equal(other, y)
    expected = torch.autograd.grad(y, leaves, dy)
    got = torch.autograd.grad(other, leaves, dy)
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


def saved_bytes(*arguments: Tensor, **options: Any) -> int:
    """Bytes of the distinct storages that a call keeps for its backward pass."""
    storages: dict[int, int] = {}
    kept: list[Tensor] = []

    def pack(v: Tensor) -> Tensor:
        storage = v.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
        kept.append(v)  # alive, so that no storage takes another's place
        return v

    with saved_tensors_hooks(pack, lambda v: v):
        kernels.conv_gru(*arguments, **options)
    return sum(storages.values())


@CONSTANT
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_gates_are_saved_and_no_more(device: str, constant: bool) -> None:
    """At stage 1's largest unit (meta): 1024 channels of 25 frames of 8x8, bf16."""
    B, T, C, H, W = (2, 25, 1024, 8, 8) if device == "meta" else (2, 3, 4, 5, 5)
    with torch.device("meta"):
        tensors = draw((B, T, C, H, W), constant=constant, dtype=torch.bfloat16)
    tensors = [torch.zeros_like(v, device=device).requires_grad_() for v in tensors]
    inputs = 2 * sum(v.numel() for v in tensors)
    tensors[0] = tensors[0].expand(-1, T, -1, -1, -1)
    y = 2 * B * T * C * H * W
    assert saved_bytes(*tensors) == inputs + y + 3 * y
    assert saved_bytes(*tensors, implementation="reference") > inputs + 7 * y
    with torch.no_grad():
        assert saved_bytes(*tensors) == 0


@CONSTANT
@pytest.mark.parametrize("implementation", FORMS)
def test_flops(implementation: str, constant: bool) -> None:
    """Forward as the docstring counts; backward twice that, less what nobody wants."""
    B, T, C, H, W = shape = 2, 5, 16, 6, 7
    with torch.device("meta"):
        x, *parameters = draw(shape, constant=constant)
        dy = torch.empty(shape)
    half = 2 * 9 * C * 3 * C * B * H * W  # per frame, and as much for what reads h
    inputs, hidden = half * (1 if constant else T), half * (T - 1)

    def count(*leaves: Tensor) -> tuple[int, int]:
        with FlopCounterMode(display=False) as forward:
            y = function(implementation, T)(*leaves)
        with FlopCounterMode(display=False) as backward:
            torch.autograd.grad(y, [v for v in leaves if v.requires_grad], dy)
        return forward.get_total_flops(), backward.get_total_flops()

    frozen, fixed_x = [v.detach() for v in parameters], x.detach()
    assert count(x, *parameters) == (inputs + hidden, 2 * (inputs + hidden))
    assert count(x, *frozen) == (inputs + hidden, inputs + hidden)
    assert count(fixed_x, *parameters) == (inputs + hidden, inputs + 2 * hidden)


@pytest.mark.parametrize("implementation", FORMS)
def test_meta_tensors_have_the_results_layout(implementation: str) -> None:
    with torch.device("meta"):
        leaves = draw((2, 3, 4, 5, 6), dtype=torch.bfloat16)
    y = function(implementation)(*leaves)
    assert y.permute(0, 1, 3, 4, 2).is_contiguous()
    assert (y.shape, y.dtype) == (leaves[0].shape, torch.bfloat16)
    for grad, leaf in zip(torch.autograd.grad(y, leaves, torch.empty_like(y)), leaves, strict=True):
        assert (grad.shape, grad.dtype) == (leaf.shape, leaf.dtype)


def test_a_backward_pass_runs_what_its_forward_pass_ran() -> None:
    leaves = draw((1, 3, 4, 3, 3))
    y = function("pytorch")(*leaves)
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    with kernels.use("reference"):
        got = torch.autograd.grad(y, leaves, dy)
        other = torch.autograd.grad(kernels.conv_gru(*leaves), leaves, dy)
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
    assert not all(torch.equal(*pair) for pair in zip(other, expected, strict=True))
