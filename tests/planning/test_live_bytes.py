"""Live bytes of hand-made cases, against what they come to by hand; floats are 4 bytes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import kernels
from engine.planning.counters import ACTIVATIONS, GRADIENTS, PARAMETERS, LiveBytes

DEVICES = pytest.mark.parametrize("device", ["cpu", "meta"])


@DEVICES
def test_tensors_come_and_go(device: str) -> None:
    with LiveBytes() as live:
        a = torch.empty(100, device=device)
        b = a + 1  # 800
        c = b * 2  # 1200, the most
        assert live.now_bytes == 1200
        del b
        assert live.now_bytes == 800
        d = c.sum()
        assert live.now_bytes == 804
        del a, c
    del d  # seen although the context has ended
    assert (live.now_bytes, live.peak_bytes) == (0, 1200)


@DEVICES
def test_views_and_what_is_done_in_place_are_the_same_memory(device: str) -> None:
    with LiveBytes() as live:
        a = torch.empty(10, 10, device=device)
        row = a[3]
        a.add_(1)
        a.T.mul_(2)
        assert live.now_bytes == live.peak_bytes == 400
        del a
        assert live.now_bytes == 400  # the row keeps all of it
        row = row.clone()
        assert live.now_bytes == 40
    assert live.peak_bytes == 440


@DEVICES
def test_a_storage_that_is_resized(device: str) -> None:
    with LiveBytes() as live:
        a = torch.empty(10, device=device)
        a.resize_(30)
        assert live.now_bytes == 120
        a.resize_(5)  # PyTorch keeps the memory
        assert live.now_bytes == 120


@DEVICES
def test_what_existed_before(device: str) -> None:
    weight, other, never = (torch.empty(100, device=device) for _ in range(3))
    with LiveBytes() as live:
        live.register(PARAMETERS, [weight, weight[:50]])
        assert live.now[PARAMETERS] == live.peak_bytes == 400
        kept = weight + other
    assert live.at_peak[PARAMETERS] == 400
    assert live.at_peak[ACTIVATIONS] == 800  # `other` and the sum
    del kept, never


def test_blocks_of_an_allocator() -> None:
    with LiveBytes(block_bytes=512) as live:
        kept = torch.empty(1), torch.empty(128), torch.empty(129), torch.empty(0)
        assert live.now_bytes == 512 + 512 + 1024
        del kept


class Square(torch.autograd.Function):
    """Keeps its input only."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return 2 * x * dy


@DEVICES
def test_a_backward_pass_frees_what_was_saved_as_it_goes_by(device: str) -> None:
    """Four squares in a row of 400 bytes each.

    Forward, x0 .. x3 are kept and y: 5. Backward from a dy, of each node: dy, 2x, 2x dy; its x is
    freed when it is done. The most is in the first: x0 .. x3, y, dy and two more, 8.
    """
    x = torch.empty(100, device=device, requires_grad=True)
    with LiveBytes() as live:
        live.register(PARAMETERS, [x])
        live.watch_gradients([x])
        y = x
        for _ in range(4):
            y = Square.apply(y)
        assert live.now_bytes == live.peak_bytes == 5 * 400
        y.backward(torch.empty(100, device=device))
        assert live.peak_bytes == 8 * 400
        assert live.now == {PARAMETERS: 400, GRADIENTS: 400, "optimizer": 0, ACTIVATIONS: 400}
        del y
        assert live.now_bytes == 800
        x.grad = None
        assert live.now_bytes == 400


@DEVICES
def test_gradients_accumulate_in_place(device: str) -> None:
    """The second backward pass's gradient lives beside the first's until it has been added."""
    weight = nn.Parameter(torch.empty(100, device=device))
    with LiveBytes() as live:
        live.register(PARAMETERS, [weight])
        live.watch_gradients([weight])
        for _ in range(2):
            (weight * 2).sum().backward()
            assert live.now[GRADIENTS] == 400
            # weight, .grad; and weight * 2 with its sum in the first pass
        assert live.now_bytes == 800
        assert live.largest[GRADIENTS] == 400


def test_checkpointing_keeps_the_input_only() -> None:
    """Two blocks of two exponentials, each of which keeps its result."""

    def block(x: Tensor) -> Tensor:
        return x.exp().exp()

    def kept(run: Callable[[Tensor], Tensor]) -> int:
        x = torch.empty(100, requires_grad=True)
        with LiveBytes() as live:
            live.register(ACTIVATIONS, [x])
            y = run(run(x))
            num_bytes = live.now_bytes
            y.sum().backward()
        return num_bytes // 400

    assert kept(block) == 5  # x, and four results
    assert kept(lambda x: checkpoint(block, x, use_reentrant=False)) == 3  # x, and what blocks give


def test_fake_tensors() -> None:
    with FakeTensorMode(), LiveBytes() as live:
        a = torch.empty(1 << 30, device="cpu")
        b = a @ a
        assert live.now_bytes == 4 * (1 << 30) + 4
        del a
        assert live.now_bytes == 4
        del b


def test_an_operator_of_ours() -> None:
    """Its results are seen, also of one that autograd runs backward."""
    x_BTHWC = torch.empty(2, 3, 4, 4, 8, device="meta", requires_grad=True)
    gain, bias = (torch.empty(2, 8, device="meta") for _ in range(2))
    with LiveBytes() as live:
        y = kernels.frame_norm(x_BTHWC.permute(0, 1, 4, 2, 3), gain, bias, implementation="triton")
        kept = 2 * 16 + 2 * 24  # gain and bias; mean and variance
        assert live.now_bytes == 4 * (2 * 768 + kept)
        y.backward(torch.empty_like(y))
        # x, y, dy and dx; of S1 and S2 their sums [2, B, C], for gain and bias, and [2, T, C] of
        # them before and after they are divided.
        assert live.peak_bytes == 4 * (4 * 768 + kept + 2 * 16 + 2 * 48)
        assert live.now_bytes == 4 * (3 * 768 + 2 * 16)
