"""Resampling folded into convolutions against the same operators as they stand."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from large_gpu import needs_gpu_memory
from torch import Tensor
from torch.nn import functional as F

import kernels
from kernels.convolution.folding import pooling_kernel, upsampling_kernel
from kernels.convolution.resampling import conv_pool_reference, upsample_conv_reference

Operator = Callable[[Tensor, Tensor, Tensor], Tensor]

# name: (operator, its reference, taps)
OPERATORS: dict[str, tuple[Operator, Operator, tuple[int, ...]]] = {
    name: (partial(run, implementation="folded"), partial(run, implementation="reference"), taps)
    for name, run, taps in (
        ("upsample", kernels.upsample_conv, (3, 3)),
        ("pool2d", kernels.conv_pool2d, (3, 3)),
        ("pool3d", kernels.conv_pool3d, (3, 3, 3)),
        ("pool3d, time too", partial(kernels.conv_pool3d, pooling=(2, 2, 2)), (3, 3, 3)),
    )
}


def inputs(
    taps: tuple[int, ...], shape: tuple[int, ...] = (2, 4, 5, 4, 6), out_channels: int = 7
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias in fp64, reproducible."""
    random = torch.Generator().manual_seed(0)
    shapes = (shape, (out_channels, *taps, shape[2]), (out_channels,))
    x, weight, bias = (torch.randn(s, generator=random, dtype=torch.float64) for s in shapes)
    return x, weight, bias


def gradients(run: Operator, *tensors: Tensor) -> list[Tensor]:
    """y, then the gradients of x, weight and bias from a random upstream."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = run(*leaves)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


@pytest.mark.parametrize(
    "shape",
    [
        (2, 4, 5, 4, 6),
        (1, 2, 1, 2, 2),  # the smallest that pools; every pixel at a border
        (2, 3, 3, 5, 7),  # odd: the last frame, row and column have no partner
        (3, 5, 2, 2, 9),
        (0, 4, 5, 4, 6),  # empty
    ],
    ids=str,
)
@pytest.mark.parametrize("name", OPERATORS)
def test_equals_reference_with_every_gradient(name: str, shape: tuple[int, ...]) -> None:
    run, reference, taps = OPERATORS[name]
    tensors = inputs(taps, shape)
    for got, expected in zip(gradients(run, *tensors), gradients(reference, *tensors), strict=True):
        scale = expected.abs().max().item() if expected.numel() else 1.0
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-13 * scale, check_stride=False)


def test_one_pixel() -> None:
    """4x4 from 1x1: nothing but borders."""
    x, weight, bias = inputs((3, 3), (1, 1, 2, 1, 1))
    expected = kernels.upsample_conv(x, weight, bias, implementation="reference")
    torch.testing.assert_close(kernels.upsample_conv(x, weight, bias), expected)


@pytest.mark.parametrize("name", OPERATORS)
def test_first_and_second_derivatives(name: str) -> None:
    run, _, taps = OPERATORS[name]
    tensors = [t.requires_grad_() for t in inputs(taps, (1, 2, 2, 2, 3), out_channels=2)]
    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


@pytest.mark.parametrize("name", OPERATORS)
def test_any_layout_of_x(name: str) -> None:
    run, _, taps = OPERATORS[name]
    x, weight, bias = inputs(taps)
    expected = run(x, weight, bias)
    B, T, _, H, W = x.shape
    strided = torch.empty(B, 2 * T, 5, H, 2 * W, dtype=x.dtype)[:, ::2, ..., ::2].copy_(x)
    last = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    for same in (strided, last, x[:, :1].expand_as(x)):
        wanted = expected if same.equal(x) else run(same.contiguous(), weight, bias)
        torch.testing.assert_close(run(same, weight, bias), wanted, check_stride=False)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rounding_is_no_worse_than_the_reference(name: str, dtype: torch.dtype) -> None:
    run, reference, taps = OPERATORS[name]
    x, weight, bias = inputs(taps, (2, 4, 16, 8, 8))
    x = x.to(dtype).double()
    truth = gradients(reference, x, weight, bias)
    tensors = x.to(dtype), weight.float(), bias.float()
    got, plain = gradients(run, *tensors), gradients(reference, *tensors)
    assert got[0].dtype == got[1].dtype == dtype
    assert got[2].dtype == got[3].dtype == torch.float32
    for mine, same, true in zip(got, plain, truth, strict=True):
        # Half an ulp of the largest value: what merely storing the result may cost. On a CPU
        # PyTorch's transposed convolution stores every tap's part of an fp16 result.
        num_roundings = 4 if dtype == torch.float16 and name == "upsample" else 1
        floor = num_roundings * true.abs().max() * torch.finfo(dtype).eps / 2
        assert (mine - true).abs().max() <= 2 * (same - true).abs().max() + floor


@pytest.mark.parametrize("name", OPERATORS)
def test_weights_are_summed_before_they_are_rounded(name: str) -> None:
    """A single lit pixel reads the taps out, each of which must have been rounded once."""
    run, reference, taps = OPERATORS[name]
    weight, nothing = inputs(taps, (1, 4, 1, 8, 8))[1].float(), torch.zeros(7)
    x = torch.zeros(1, 4, 1, 8, 8, dtype=torch.bfloat16)
    x[:, 2, :, 4, 4] = 1
    y = run(x, weight, nothing)
    assert torch.equal(y, reference(x.float(), weight, nothing).bfloat16())
    rounded_first = reference(x.float(), weight.bfloat16().float(), nothing).bfloat16()
    assert not torch.equal(y, rounded_first)


def test_kernels_are_the_published_matrices() -> None:
    """U w Uᵀ for upsampling and A w Aᵀ, A = flip(U) / 2, for pooling."""
    U = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.float64)
    A = U.flip(0) / 2
    _, weight, _ = inputs((3, 3))
    expected = torch.einsum("ah,bw,ohwi->oabi", U, U, weight)
    torch.testing.assert_close(upsampling_kernel(weight), expected)
    expected = torch.einsum("ah,bw,ohwi->oabi", A, A, weight)
    torch.testing.assert_close(pooling_kernel(weight, (2, 2)), expected)
    _, deep, _ = inputs((3, 3, 3))
    expected = torch.einsum("ah,bw,othwi->otabi", A, A, deep)
    torch.testing.assert_close(pooling_kernel(deep, (1, 2, 2)), expected)
    expected = torch.einsum("ct,ah,bw,othwi->ocabi", A, A, A, deep)
    torch.testing.assert_close(pooling_kernel(deep, (2, 2, 2)), expected)


@pytest.mark.parametrize("name", OPERATORS)
def test_compiles_into_one_graph(name: str) -> None:
    run, _, taps = OPERATORS[name]
    tensors = inputs(taps)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, expected in zip(gradients(compiled, *tensors), gradients(run, *tensors), strict=True):
        torch.testing.assert_close(got, expected, check_stride=False)


def test_implementations_are_chosen_by_name() -> None:
    x, flat, bias = inputs((3, 3))
    _, deep, _ = inputs((3, 3, 3))
    operators: tuple[tuple[str, Any, Any, Tensor], ...] = (
        ("upsample_conv", kernels.upsample_conv, upsample_conv_reference, flat),
        ("conv_pool2d", kernels.conv_pool2d, conv_pool_reference, flat),
        ("conv_pool3d", kernels.conv_pool3d, conv_pool_reference, deep),
    )
    for name, public, as_it_stands, weight in operators:
        reference = as_it_stands(x, weight, bias)
        assert torch.equal(public(x, weight, bias, implementation="reference"), reference)
        assert torch.equal(
            public(x, weight, bias), public(x, weight, bias, implementation="folded")
        )
        # Bit for bit the two differ: each is known to have run.
        assert not torch.equal(public(x, weight, bias), reference)
        with kernels.use("reference"):
            assert torch.equal(public(x, weight, bias), reference)
        assert kernels.implementations("cpu")[name].implementation == "folded"
        with pytest.raises(kernels.ImplementationError, match=f"{name} has no implementation"):
            public(x, weight, bias, implementation="fastest")


def test_refusals() -> None:
    x, _, bias = inputs((3, 3))
    _, deep, _ = inputs((3, 3, 3))
    with pytest.raises(ValueError, match=r"must be \[O, 3, 3, I\], .* not \[7, 5, 5, 5\]"):
        kernels.upsample_conv(x, torch.zeros(7, 5, 5, 5), bias)
    for implementation in ("reference", "folded"):
        with pytest.raises(ValueError, match=r"pooling must be .* not \(2, 1, 1\)"):
            kernels.conv_pool3d(x, deep, bias, pooling=(2, 1, 1), implementation=implementation)
        with pytest.raises(ValueError, match=r"\(1, 4, 6\) .* is smaller than \(2, 2, 2\)"):
            kernels.conv_pool3d(
                x[:, :1], deep, bias, pooling=(2, 2, 2), implementation=implementation
            )
        with pytest.raises(ValueError, match=r"\(4, 4, 1\) .* is smaller than \(1, 2, 2\)"):
            kernels.conv_pool2d(x[..., :1], deep[:, 0], bias, implementation=implementation)


@pytest.mark.parametrize("implementation", ["reference", "folded"])
def test_time_is_pooled_in_pairs(implementation: str) -> None:
    x, weight, bias = inputs((3, 3, 3), (2, 5, 3, 4, 4))
    y = kernels.conv3d(x, weight, bias)
    expected = F.avg_pool3d(y.transpose(1, 2), 2).transpose(1, 2)
    residual = kernels.average_pool(torch.randn_like(y), (2, 2, 2))
    got = kernels.conv_pool3d(
        x, weight, bias, residual_BTOHW=residual, pooling=(2, 2, 2), implementation=implementation
    )
    torch.testing.assert_close(got, expected + residual, check_stride=False)


def whole_numbers(*shape: int) -> tuple[Tensor, Tensor]:
    """x in bf16 on a GPU, every sample and frame as the first, and the identity as a 3x3 weight.

    So few bits that what is made of them below is exact, whichever way cuDNN sums it.
    """
    one = torch.randint(-8, 9, (1, 1, *shape[2:]), device="cuda").bfloat16()
    one = one.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    weight = torch.zeros(shape[2], 3, 3, shape[2], device="cuda")
    weight[:, 1, 1] = torch.eye(shape[2], device="cuda")
    x = one.repeat(shape[0], shape[1], 1, 1, 1)
    return x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3).requires_grad_(), weight


@pytest.mark.gpu
@needs_gpu_memory(32)  # y and its gradient: 4.3 GB each, and as much where cuDNN takes parts
def test_upsampling_to_more_than_2_to_the_31_values() -> None:
    x, weight = whole_numbers(1, 129, 64, 256, 256)
    y = kernels.upsample_conv(x, weight, torch.ones(64, device="cuda"))
    assert y.numel() > 2**31
    [dx] = torch.autograd.grad(y, x, y.detach())
    for t in (0, 64, 128):
        for quarter in (y[:, t, :, i::2, j::2] for i in (0, 1) for j in (0, 1)):
            assert torch.equal(quarter, x[:, t] + 1)
        assert torch.equal(dx[:, t], 4 * (x[:, t] + 1))


@pytest.mark.gpu
@needs_gpu_memory(32)  # x and its gradient: 4.3 GB each, and as much where cuDNN takes parts
@pytest.mark.parametrize("pooling", [None, (1, 2, 2), (2, 2, 2)], ids=str)
def test_pooling_more_than_2_to_the_31_values(pooling: kernels.Pooling | None) -> None:
    """In two frames, because cuDNN takes a volume of so many values by parts of the batch."""
    x, flat = whole_numbers(66, 2, 64, 512, 512)
    assert x.numel() > 2**31
    if pooling is None:
        y = kernels.conv_pool2d(x, flat)
    else:
        deep = torch.stack([torch.zeros_like(flat), flat, torch.zeros_like(flat)], 1)
        y = kernels.conv_pool3d(x, deep, pooling=pooling)
    box = pooling or (1, 2, 2)
    [dx] = torch.autograd.grad(y, x, y.detach())
    for b in (0, 32, 65):
        assert torch.equal(y[b, -1], F.avg_pool2d(x[b, -1].float(), 2).bfloat16())
        for pixel in (dx[b, -1, :, i::2, j::2] for i in (0, 1) for j in (0, 1)):
            assert torch.equal(pixel, y[b, -1] / (4 * box[0]))
