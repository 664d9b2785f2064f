"""Per-frame conditional norm against loops in fp64, and its numerical promises."""

import torch
from torch import Tensor

import kernels


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def naive(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    y = torch.empty_like(x)
    for t in range(x.shape[1]):
        for c in range(x.shape[2]):
            values = x[:, t, c]
            normal = (values - values.mean()) / (values.var(correction=0) + 1e-4).sqrt()
            y[:, t, c] = gain[:, c, None, None] * normal + bias[:, c, None, None]
    return y.clamp_min(0)


def test_statistics_are_of_each_frame_and_channel() -> None:
    x, gain, bias = 3 * randn(2, 3, 4, 5, 6) + 1, randn(2, 4), randn(2, 4)
    got = kernels.frame_norm(x, gain, bias)
    torch.testing.assert_close(got, naive(x, gain, bias), check_stride=False)
    # Where var is as small as epsilon, that decides.
    got = kernels.frame_norm(x / 300, gain, bias)
    torch.testing.assert_close(got, naive(x / 300, gain, bias), check_stride=False)


def test_given_statistics_are_used() -> None:
    x, gain, bias = randn(2, 3, 4, 5, 6), randn(2, 4), randn(2, 4)
    mean, var = randn(3, 4), 1e-3 * randn(3, 4).square()
    got = kernels.frame_norm(x, gain, bias, statistics=(mean, var))
    normal = (x - mean[..., None, None]) / (var[..., None, None] + 1e-4).sqrt()
    expected = gain[:, None, :, None, None] * normal + bias[:, None, :, None, None]
    torch.testing.assert_close(got, expected.clamp_min(0), check_stride=False)


def test_own_statistics_given_back_change_nothing() -> None:
    x, gain, bias = randn(2, 3, 4, 5, 6), randn(2, 4), randn(2, 4)
    given = kernels.frame_norm(x, gain, bias, statistics=kernels.frame_statistics(x))
    assert torch.equal(given, kernels.frame_norm(x, gain, bias))


def test_statistics_are_centred() -> None:
    """In fp32, E[x²] - E[x]² of values near 4096 has an error of 4096²·2⁻²⁴ = 1, as big as var."""
    x = randn(4, 2, 3, 8, 8) + 4096
    mean, var = kernels.frame_statistics(x.float())
    exact = x.float().double()  # the rounding of x itself is not the operator's
    torch.testing.assert_close(mean.double(), exact.mean(dim=(0, 3, 4)), rtol=1e-6, atol=0)
    # What is left is the mean's own rounding, half an ulp of 4096: 2.4e-4, squared.
    torch.testing.assert_close(
        var.double(), exact.var(dim=(0, 3, 4), correction=0), rtol=1e-5, atol=1e-6
    )


def test_bf16_is_normalised_in_fp32() -> None:
    x, gain, bias = (randn(4, 2, 3, 8, 8) + 20).bfloat16(), randn(4, 3), randn(4, 3)
    got = kernels.frame_norm(x, gain.float(), bias.float())
    assert got.dtype == torch.bfloat16
    expected = naive(x.double(), gain, bias)
    # One rounding to bf16 (2⁻⁸ relative) at the very end is all that is allowed.
    torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=1e-5, check_stride=False)


def test_gradients() -> None:
    x, gain, bias = randn(2, 2, 2, 2, 3), randn(2, 2), randn(2, 2)
    inputs = [v.requires_grad_() for v in (x, gain, bias)]
    assert torch.autograd.gradcheck(kernels.frame_norm, inputs)

    def given(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return kernels.frame_norm(x, gain, bias, statistics=(mean, var))

    statistics = [v.detach().requires_grad_() for v in kernels.frame_statistics(x)]
    assert torch.autograd.gradcheck(given, [x, *statistics])
