"""The whole-sequence ConvGRU against the paper's cell, written out here in fp64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from kernels.conv_gru.pytorch import conv_gru_reference

Gru = Callable[..., Tensor]


def parameters(channels: int) -> list[Tensor]:
    """W_r, W_u, W_c [C, 3, 3, 2C] and their biases, as they are stored."""
    weights = [0.3 * torch.randn(channels, 3, 3, 2 * channels) for _ in range(3)]
    biases = [torch.randn(channels) for _ in range(3)]
    return [v.double().requires_grad_() for v in (*weights, *biases)]


def cell(x: Tensor, h: Tensor, w: list[Tensor]) -> Tensor:
    def conv(first: Tensor, second: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        together = torch.cat([first, second], dim=1)
        return F.conv2d(together, weight.permute(0, 3, 1, 2), bias, padding=1)

    r = torch.sigmoid(conv(h, x, w[0], w[3]))
    u = torch.sigmoid(conv(h, x, w[1], w[4]))
    c = torch.relu(conv(x, r * h, w[2], w[5]))
    return u * h + (1 - u) * c


def naive(x: Tensor, w: list[Tensor]) -> Tensor:
    h = torch.zeros_like(x[:, 0])
    states = []
    for t in range(x.shape[1]):
        h = cell(x[:, t], h, w)
        states.append(h)
    return torch.stack(states, dim=1)


@pytest.mark.parametrize("gru", [kernels.conv_gru, conv_gru_reference])
@pytest.mark.parametrize("num_frames", [1, 2, 5])  # no recurrence, one step, many
def test_forward_and_every_gradient(gru: Gru, num_frames: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, num_frames, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    w = parameters(4)
    expected, got = naive(x, w), gru(x, *w)
    torch.testing.assert_close(got, expected, check_stride=False)
    upstream = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(got, [x, *w], upstream),
        torch.autograd.grad(expected, [x, *w], upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, check_stride=False)


def test_constant_input_is_convolved_once_and_gives_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    frame = torch.randn(2, 1, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    w = parameters(4)
    expected = naive(frame.expand(-1, 5, -1, -1, -1), w)
    batches = []
    convolve = F.conv2d

    def counting(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        batches.append(len(x))
        return convolve(x, *args, **kwargs)

    monkeypatch.setattr(F, "conv2d", counting)
    got = kernels.conv_gru(frame.expand(-1, 5, -1, -1, -1), *w)
    monkeypatch.undo()
    assert batches == [2] * (1 + 2 * 4)  # the input of 2 samples once, two convs of h per step
    torch.testing.assert_close(got, expected, check_stride=False)
    upstream = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(got, [frame, *w], upstream),
        torch.autograd.grad(expected, [frame, *w], upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, check_stride=False)


@pytest.mark.parametrize("wants_gradients", [False, True])
@pytest.mark.parametrize("first", [1, 3])
def test_a_sequence_in_two_calls(first: int, wants_gradients: bool) -> None:
    """The second call goes on from the first one's last h, which gradients pass too."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 4, 3, 5, dtype=torch.float64, requires_grad=wants_gradients)
    w = [v.detach().requires_grad_(wants_gradients) for v in parameters(4)]
    expected = naive(x, w)
    before = kernels.conv_gru(x[:, :first], *w)
    after = kernels.conv_gru(x[:, first:], *w, hidden_BCHW=before[:, -1])
    got = torch.cat([before, after], dim=1)
    torch.testing.assert_close(got, expected, check_stride=False)
    if wants_gradients:
        upstream = torch.randn_like(expected)
        for ours, theirs in zip(
            torch.autograd.grad(got, [x, *w], upstream),
            torch.autograd.grad(expected, [x, *w], upstream),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, check_stride=False)


def test_a_hidden_state_of_another_shape_is_refused() -> None:
    x, w = torch.randn(2, 5, 4, 3, 5, dtype=torch.float64), parameters(4)
    with pytest.raises(ValueError, match=r"h must be \[2, 4, 3, 5\], not \(1, 4, 3, 5\)"):
        kernels.conv_gru(x, *w, hidden_BCHW=x[:1, 0])


def test_finite_differences() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(kernels.conv_gru, [x, *parameters(2)])
