"""Convolution operators against per-frame and per-pixel arithmetic written out, in fp64."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import kernels
from kernels.convolution import terms


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def naive_conv(x_BTIHW: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Every tap of a [O, kt, kh, kw, I] kernel, shifted and added; zero padding."""
    kt, kh, kw = weight.shape[1:4]
    T, _, H, W = x_BTIHW.shape[1:]
    padded = F.pad(x_BTIHW, (kw // 2, kw // 2, kh // 2, kh // 2, 0, 0, kt // 2, kt // 2))
    y = bias[None, None, :, None, None].expand(len(x_BTIHW), T, -1, H, W).clone()
    for t in range(kt):
        for i in range(kh):
            for j in range(kw):
                window = padded[:, t : t + T, :, i : i + H, j : j + W]
                y += torch.einsum("bnihw,oi->bnohw", window, weight[:, t, i, j])
    return y


def naive_up(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)


def naive_pool(x: Tensor) -> Tensor:
    quarters = [x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]
    return torch.stack(quarters).mean(dim=0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill what `empty` returns with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("size", [1, 3])
def test_conv2d(size: int) -> None:
    x, weight, bias = randn(2, 3, 5, 4, 6), randn(7, size, size, 5), randn(7)
    expected = naive_conv(x, weight[:, None], bias)
    torch.testing.assert_close(kernels.conv2d(x, weight, bias), expected)
    residual = randn(2, 3, 7, 4, 6)
    got = kernels.conv2d(x, weight, bias, residual_BTOHW=residual)
    torch.testing.assert_close(got, expected + residual)
    got = kernels.conv2d(x, weight, bias, residual_BTOHW=residual, relu=True)
    torch.testing.assert_close(got, (expected + residual).clamp(min=0))
    got = kernels.conv2d(x, weight, bias, relu=True)
    torch.testing.assert_close(got, expected.clamp(min=0))


def test_conv3d_adds_the_residual() -> None:
    x, weight, bias = randn(2, 3, 5, 4, 6), randn(7, 3, 3, 3, 5), randn(7)
    expected = naive_conv(x, weight, bias)
    torch.testing.assert_close(kernels.conv3d(x, weight, bias), expected)
    residual = randn(2, 3, 7, 4, 6)
    got = kernels.conv3d(x, weight, bias, residual_BTOHW=residual)
    torch.testing.assert_close(got, expected + residual)
    got = kernels.conv3d(x, weight, bias, residual_BTOHW=residual, relu=True)
    torch.testing.assert_close(got, (expected + residual).clamp(min=0))
    got = kernels.conv3d(x, weight, bias, relu=True)
    torch.testing.assert_close(got, expected.clamp(min=0))


@pytest.mark.parametrize("implementation", ["reference", "folded"])
def test_upsample_conv(implementation: str) -> None:
    x, weight, bias = randn(2, 3, 5, 4, 6), randn(7, 3, 3, 5), randn(7)
    expected = naive_conv(naive_up(x), weight[:, None], bias)
    torch.testing.assert_close(
        kernels.upsample_conv(x, weight, bias, implementation=implementation), expected
    )


@pytest.mark.parametrize("setting", ["auto", "reference"])
def test_an_upsampled_shortcut_is_the_projection_of_the_upsampled_input(setting: str) -> None:
    x, weight, bias = randn(2, 3, 5, 8, 12), randn(7, 3, 3, 5), randn(7)
    low, projection, shift = randn(2, 3, 4, 4, 6), randn(7, 1, 1, 4), randn(7)
    shortcut = naive_conv(naive_up(low), projection[:, None], shift)
    expected = naive_conv(x, weight[:, None], bias) + shortcut
    residual = kernels.UpsampledShortcut(low, projection, shift)
    with kernels.use(setting), FlopCounterMode(display=False) as counter:
        got = kernels.conv2d(x, weight, bias, residual_BTOHW=residual)
    torch.testing.assert_close(got, expected)
    # The reference, what others are measured against, upsamples first.
    projected_pixels = {"auto": 4 * 6, "reference": 8 * 12}[setting]
    flops = 2 * 2 * 3 * 7 * (9 * 5 * 8 * 12 + 4 * projected_pixels)
    assert counter.get_total_flops() == flops


def test_sums_of_four_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with too many values for PyTorch's kernels: five frames as 2, 2 and 1."""
    dy = torch.randn(1, 5, 8 * 6, 3)
    whole = terms.sums_of_four(dy, (8, 6))
    expected = dy.view(1, 5, 4, 2, 3, 2, 3).sum((3, 5)).flatten(2, 3)
    torch.testing.assert_close(whole, expected)
    num_frames = []

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            if func is torch.ops.aten.upsample_nearest2d_backward.default:
                num_frames.append(len(args[0]))
            return func(*args, **(kwargs or {}))

    # A frame has 3 channels of 48 pixels; a part must have fewer values than this.
    monkeypatch.setattr(terms, "MOST_SUMMED", 2 * 3 * 48 + 1)
    with Counted():
        parts = terms.sums_of_four(dy, (8, 6))
    assert num_frames == [2, 2, 1]
    assert torch.equal(whole, parts)
    assert whole.stride() == parts.stride()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_upsampled_shortcut_to_more_than_2_to_the_31_values() -> None:
    low = torch.randn(1, 1, 64, 256, 256, device="cuda", dtype=torch.bfloat16)
    low = low.expand(1, 129, -1, -1, -1).contiguous().requires_grad_()
    x = torch.ones(1, 129, 1, 512, 512, device="cuda", dtype=torch.bfloat16)
    identity = torch.eye(64, device="cuda", dtype=torch.bfloat16).view(64, 1, 1, 64)
    nothing = torch.zeros(64, device="cuda", dtype=torch.bfloat16)
    shortcut = kernels.UpsampledShortcut(low, identity, nothing)
    y = kernels.conv2d(x, torch.zeros_like(identity[..., :1]), residual_BTOHW=shortcut)
    assert y.numel() > 2**31
    [dlow] = torch.autograd.grad(y, low, y.detach())
    assert torch.equal(y[:, 128, :, ::2, 1::2], low[:, 128])
    assert torch.equal(dlow, 4 * low)


@pytest.mark.parametrize("implementation", ["reference", "folded"])
def test_conv_pool_2d_and_3d_keep_every_frame(implementation: str) -> None:
    x, bias, residual = randn(2, 3, 5, 4, 6), randn(7), randn(2, 3, 7, 2, 3)
    flat, deep = randn(7, 3, 3, 5), randn(7, 3, 3, 3, 5)
    expected = naive_pool(naive_conv(x, flat[:, None], bias)) + residual
    got = kernels.conv_pool2d(x, flat, bias, residual_BTOHW=residual, implementation=implementation)
    torch.testing.assert_close(got, expected)
    expected = naive_pool(naive_conv(x, deep, bias)) + residual
    got = kernels.conv_pool3d(x, deep, bias, residual_BTOHW=residual, implementation=implementation)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(kernels.average_pool(x), naive_pool(x))


class WholeVolumes(TorchDispatchMode):
    """Notes the gradients that are asked of convolutions over three axes: of x, weight and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[list[bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default and args[2].ndim == 5:
            self.asked.append(args[-1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_frames", [1, 2, 5])
def test_conv_pool_3d_takes_its_weights_gradient_over_frames(num_frames: int) -> None:
    """On a CPU; a bias's, asked for beside x's, would cost all of the weight's over the volume."""
    leaves = randn(2, num_frames, 5, 4, 6), randn(7, 3, 3, 3, 5), randn(7)
    found = []
    for implementation in ("reference", None):
        x, weight, bias = (leaf.clone().requires_grad_() for leaf in leaves)
        y = kernels.conv_pool3d(x, weight, bias, implementation=implementation)
        with WholeVolumes() as volumes:
            found.append(torch.autograd.grad(y.square().sum(), (x, weight, bias)))
    assert volumes.asked == [[True, False, False]]
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("num_frames", [1, 2, 5])  # shorter than, equal to and past the taps
def test_separable_conv3d(num_frames: int) -> None:
    x = randn(2, num_frames, 5, 4, 6)
    temporal, spatial, bias = randn(7, 3, 5), randn(7, 3, 3, 7), randn(7)
    mixed = naive_conv(x, temporal[:, :, None, None], torch.zeros(7, dtype=torch.float64))
    expected = naive_conv(mixed, spatial[:, None], bias)
    torch.testing.assert_close(kernels.separable_conv3d(x, temporal, spatial, bias), expected)


def naive_low_skip(skip: kernels.LowSkip, shape: torch.Size) -> Tensor:
    num_frames, height, width = shape[1], shape[3], shape[4]
    low_frames, low_height, low_width = (skip.video.shape[i] for i in (1, 3, 4))
    added = torch.zeros(shape, dtype=torch.float64)
    for t in range(num_frames):
        for i in range(height):
            for j in range(width):
                pixel = skip.video[
                    :,
                    t * low_frames // num_frames,
                    :,
                    i * low_height // height,
                    j * low_width // width,
                ]
                added[:, t, :, i, j] = pixel @ skip.weight[:, 0, 0].T + skip.bias
    return added


def test_low_skip_repeats_frames_and_skips_pixels() -> None:
    skip = kernels.LowSkip(randn(2, 3, 3, 8, 4), randn(7, 1, 1, 3), randn(7))
    y = randn(2, 6, 7, 4, 2)
    torch.testing.assert_close(
        kernels.add_low_skip(y, skip), y + naive_low_skip(skip, y.shape), check_stride=False
    )


def test_convolutions_end_with_residual_and_skip() -> None:
    x, residual = randn(2, 6, 5, 4, 2), randn(2, 6, 7, 4, 2)
    skip = kernels.LowSkip(randn(2, 3, 3, 8, 4), randn(7, 1, 1, 3), randn(7))
    terms = residual + naive_low_skip(skip, residual.shape)
    weight, bias, temporal = randn(7, 3, 3, 5), randn(7), randn(7, 3, 5)
    got = kernels.conv2d(x, weight, bias, residual_BTOHW=residual, skip=skip)
    torch.testing.assert_close(got, kernels.conv2d(x, weight, bias) + terms)
    spatial = randn(7, 3, 3, 7)
    got = kernels.separable_conv3d(x, temporal, spatial, bias, residual_BTOHW=residual, skip=skip)
    torch.testing.assert_close(got, kernels.separable_conv3d(x, temporal, spatial, bias) + terms)


@pytest.mark.parametrize(
    "low_shape", [(2, 3, 3, 2, 2), (2, 3, 3, 6, 4), (2, 4, 3, 8, 4)], ids=["small", "6/4", "frames"]
)
def test_low_skip_refuses_to_upsample_or_interpolate(low_shape: tuple[int, ...]) -> None:
    skip = kernels.LowSkip(randn(*low_shape), randn(7, 1, 1, 3), randn(7))
    with pytest.raises(ValueError, match="cannot be injected"):
        kernels.add_low_skip(randn(2, 6, 7, 4, 4), skip)


def test_every_output_is_channels_last_in_memory() -> None:
    """Else each following convolution would copy its input (fp32: fp64 has no oneDNN)."""
    x = torch.randn(2, 4, 8, 4, 4).permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    flat, deep, taps = torch.randn(8, 3, 3, 8), torch.randn(8, 3, 3, 3, 8), torch.randn(8, 3, 8)
    skip = kernels.LowSkip(torch.randn(2, 2, 3, 8, 8), torch.randn(8, 1, 1, 3), torch.randn(8))
    gates, biases = [torch.randn(8, 3, 3, 16) for _ in range(3)], [torch.randn(8) for _ in range(3)]
    outputs = {
        "conv2d": kernels.conv2d(x, flat),
        "conv2d, relu": kernels.conv2d(x, flat, relu=True),
        "conv3d": kernels.conv3d(x, deep),
        "conv3d, relu": kernels.conv3d(x, deep, relu=True),
        "upsample": kernels.upsample_conv(x, flat),
        "pool2d": kernels.conv_pool2d(x, flat),
        "pool3d": kernels.conv_pool3d(x, deep),
        "separable": kernels.separable_conv3d(x, taps, flat, skip=skip),
        "norm": kernels.frame_norm(x, torch.randn(2, 8), torch.randn(2, 8)),
        "gru": kernels.conv_gru(x, *gates, *biases),
    }
    wrong = [k for k, y in outputs.items() if not y.permute(0, 1, 3, 4, 2).is_contiguous()]
    assert not wrong


@pytest.mark.parametrize("with_residual", [False, True])  # of another way to the gradients
def test_narrow_conv3d_gradients_are_not_uninitialised_memory(
    poisoned: None, with_residual: bool
) -> None:
    # The matching discriminator's first block in the smallest configuration: torch 2.13's oneDNN
    # leaves this weight gradient unwritten in bf16.
    x_BTIHW = torch.randn(4, 2, 6, 8, 8, dtype=torch.bfloat16)
    weight = torch.randn(4, 3, 3, 3, 6, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(4, 2, 4, 8, 8)
    residual = torch.randn(4, 2, 4, 8, 8)
    gradients = []
    for dtype in (torch.bfloat16, torch.float64):
        added = residual.to(dtype) if with_residual else None
        y = kernels.conv3d(x_BTIHW.to(dtype), weight.to(dtype), residual_BTOHW=added)
        (gradient,) = torch.autograd.grad(y, weight, upstream.to(dtype))
        gradients.append(gradient.double())
    # The upstream and the result are rounded to bf16 once each.
    torch.testing.assert_close(*gradients, rtol=2**-7, atol=2**-7 * gradients[1].abs().max().item())
