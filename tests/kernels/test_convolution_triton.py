"""The Triton convolutions against `torch.nn.functional.conv3d` in fp64.

On a CPU they run in Triton's interpreter, some 10 ms per product of two tiles, hence the small
sizes; it computes bf16 wrongly, which is for a GPU. Tensors are channels last: [B, T, H, W, C].
"""
# ruff: noqa: E741  (I and O are input and output channels)

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.convolution.pytorch import convolve_volume
from kernels.convolution.terms import LowSkip, add_low_skip

convolution = pytest.importorskip("kernels.convolution.triton")
epilogue = pytest.importorskip("kernels.convolution.epilogue")

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = (torch.float32, torch.float16)
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")

TEMPORAL, SPATIAL, POINT, FULL = (3, 1, 1), (1, 3, 3), (1, 1, 1), (3, 3, 3)

# B, T, H, W, I, O and the kernel. Tiles have 64 or 128 rows, 16 to 128 columns, and 16 to 64
# input channels per product; rows are B·H·W.
SIZES: dict[str, tuple[int, int, int, int, int, int, tuple[int, ...]]] = {
    "one value": (1, 1, 1, 1, 1, 1, SPATIAL),
    "one frame: two of three taps lie in no time": (1, 1, 2, 3, 5, 3, TEMPORAL),
    "one tap": (2, 2, 3, 3, 16, 16, POINT),
    "a tile of five samples and the next tile's": (5, 2, 4, 4, 3, 5, SPATIAL),
    "two tiles, 4 rows in the second": (1, 1, 12, 11, 3, 3, SPATIAL),
    "a row and a column of pixels": (2, 1, 1, 7, 3, 4, SPATIAL),
    "a channel more than a tile and two products": (1, 2, 2, 3, 33, 65, TEMPORAL),
    "three products of 32 channels": (1, 2, 2, 2, 96, 96, TEMPORAL),
    "products of 64 channels": (1, 1, 2, 2, 64, 20, POINT),
    "nine row tiles, a group and one more": (1, 9, 2, 2, 2, 65, TEMPORAL),
    "3x3x3": (1, 3, 3, 4, 3, 4, FULL),
    "5x5, wider than the frame": (1, 1, 3, 2, 2, 2, (1, 5, 5)),
}
SMALL = (2, 4, 4, 6, 5, 6, TEMPORAL)


@dataclass(frozen=True)
class Case:
    """Arguments of a convolution; `weight` None: of `add_terms`, whose y is `x`."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None = None
    residual: Tensor | None = None
    skip: tuple[Tensor, Tensor, Tensor] | None = None
    relu: bool = False

    def map(self, change: Callable[[Tensor], Tensor]) -> "Case":
        """`change` of all tensors."""

        def changed(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(change, value))
            return change(value) if isinstance(value, Tensor) else value

        return Case(**{name: changed(value) for name, value in vars(self).items()})

    def run(self, moments: bool = True) -> tuple[Tensor, Any]:
        """By the Triton kernels."""
        terms = self.bias, self.residual, self.skip, moments, self.relu
        if self.weight is None:
            return epilogue.add_terms(self.x, *terms)
        return convolution.convolve(self.x, self.weight, *terms)

    def chain(self) -> Tensor:
        """By PyTorch, in the dtype of x, one operator after the other."""
        x = self.x.permute(0, 4, 1, 2, 3)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.weight is not None:
            padding = [size // 2 for size in self.weight.shape[1:4]]
            y = convolve_volume(x, self.weight.permute(0, 4, 1, 2, 3), bias, padding=padding)
        else:
            y = x if bias is None else x + bias[:, None, None, None]
        if self.residual is not None:
            times = y.shape[3] // self.residual.shape[2]
            residual = self.residual.repeat_interleave(times, 2).repeat_interleave(times, 3)
            y = y + residual.permute(0, 4, 1, 2, 3)
        y = y.transpose(1, 2)
        if self.skip is not None:
            video, weight, low_bias = self.skip
            taps = weight[:, None, None, :].to(y.dtype)
            low = LowSkip(video.permute(0, 1, 4, 2, 3), taps, low_bias.to(y.dtype))
            y = add_low_skip(y, low)
        y = y.relu() if self.relu else y
        return y.permute(0, 1, 3, 4, 2)


def draw(
    size: tuple[int, int, int, int, int, int, tuple[int, ...]],
    dtype: torch.dtype,
    *,
    bias: bool = False,
    narrow_bias: bool = False,
    residual: bool = False,
    half: bool = False,
    skip: tuple[int, int, int, int] | None = None,
    relu: bool = False,
    product: bool = True,
    seed: int = 0,
) -> Case:
    """`half`: the residual is to be upsampled; `skip`: T / t, h / H, w / W and the channels of x_l;
    not `product`: of `add_terms`."""
    B, T, H, W, I, O, taps = size
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    low = None
    if skip is not None:
        step, down, across, channels = skip
        low = (
            randn(B, T // step, H * down, W * across, channels),
            randn(O, channels),
            randn(O),
        )
    return Case(
        x=randn(B, T, H, W, I) if product else randn(B, T, H, W, O),
        weight=randn(O, *taps, I) if product else None,
        bias=randn(O, dtype=dtype if narrow_bias else torch.float32) if bias else None,
        residual=randn(B, T, H >> half, W >> half, O) if residual else None,
        skip=low,
        relu=relu,
    )


def floor(case: Case, truth: Tensor) -> float:
    """The one rounding of y, and eight fp32 roundings of the terms' magnitudes, which cancel.

    The chain may round luckily, so that twice its error is too little to ask for.
    """
    magnitude = case.map(lambda tensor: tensor.double().abs()).chain().max().item()
    return torch.finfo(case.x.dtype).eps / 2 * truth.abs().max().item() + 8 * 2**-24 * magnitude


def assert_as_good_as_the_chain(case: Case) -> None:
    """y's error against fp64 at most twice PyTorch's, and the moments those of the y returned."""
    truth = case.map(Tensor.double).chain()
    y, moments = case.run()
    assert (y.dtype, y.shape) == (case.x.dtype, truth.shape)
    assert y.is_contiguous()
    error, usual = ((v.double() - truth).abs().max().item() for v in (y, case.chain()))
    assert error <= 2 * usual + floor(case, truth), f"{error} against {usual}"
    assert_moments(y, moments)


def assert_moments(y: Tensor, moments: tuple[Tensor, Tensor]) -> None:
    """As of y in fp64, up to eight fp32 roundings of √n values.

    A mean of E[y²] - E[y]² form would err by roundings of y², not of |y|·std.
    """
    mean, var = moments
    values = y.double()
    exact = values.mean((0, 2, 3)), values.var((0, 2, 3), correction=0)
    rounding = 8 * 2**-24 * (values.numel() / exact[0].numel()) ** 0.5
    largest, std = values.abs().max().item(), exact[1].max().item() ** 0.5
    for got, right, scale in zip(
        (mean, var), exact, (largest, (std + 2**-20) * largest), strict=True
    ):
        assert got.dtype == torch.float32
        assert got.shape == right.shape
        assert (got.double() - right).abs().max().item() <= rounding * scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_sizes(size: Any, dtype: torch.dtype) -> None:
    assert_as_good_as_the_chain(draw(size, dtype))


OPTIONS: dict[str, dict[str, Any]] = {
    "bias": {"bias": True},
    "bias of the dtype of x": {"bias": True, "narrow_bias": True},
    "residual": {"residual": True},
    "residual upsampled": {"residual": True, "half": True},
    "x_l of the same size": {"skip": (1, 1, 1, 3)},
    "x_l half as long": {"skip": (2, 1, 1, 3)},
    "x_l of one frame, larger, not square": {"skip": (4, 2, 3, 3)},
    "x_l of one channel": {"skip": (2, 2, 2, 1)},
    "x_l of more channels than a product's 16": {"skip": (1, 1, 2, 17)},
    "relu": {"relu": True},
    "all": {"bias": True, "residual": True, "skip": (2, 2, 2, 3)},
    "all, upsampled": {"bias": True, "residual": True, "half": True, "skip": (2, 2, 2, 3)},
    "all and relu": {"bias": True, "residual": True, "skip": (2, 2, 2, 3), "relu": True},
}


@pytest.mark.parametrize("product", [True, False], ids=["convolve", "add_terms"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_each_option(options: dict[str, Any], product: bool) -> None:
    for dtype in DTYPES if options == OPTIONS["all"] else DTYPES[1:]:
        assert_as_good_as_the_chain(draw(SMALL, dtype, product=product, **options))


# Tiles are 2048 values, 16 pixels of 128 channels; a split is at least four of them.
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1, 1), (3, 2, 4, 4, 96), (2, 1, 5, 13, 33), (1, 1, 16, 9, 128), (1, 2, 3, 3, 160)],
    ids=["one value", "4x4", "odd", "three splits, one a single tile", "five channel blocks"],
)
def test_sizes_of_the_terms_alone(shape: tuple[int, ...]) -> None:
    B, T, H, W, O = shape
    options: dict[str, Any] = {"bias": True, "residual": True, "skip": (T, 1, 2, 3)}
    case = draw((B, T, H, W, 1, O, POINT), torch.float16, product=False, **options)
    assert_as_good_as_the_chain(case)


@pytest.mark.parametrize("size", [(2, 2), (18, 10)], ids=["one pixel upsampled", "three splits"])
def test_sizes_of_an_upsampled_residual(size: tuple[int, int]) -> None:
    case = draw(
        (2, 3, *size, 1, 128, POINT), torch.float16, product=False, residual=True, half=True
    )
    assert_as_good_as_the_chain(case)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    frames=st.tuples(*(st.integers(1, most) for most in (3, 3, 5, 5))),
    channels=st.tuples(st.integers(1, 20), st.integers(1, 70)),
    taps=st.sampled_from([TEMPORAL, SPATIAL, POINT, (3, 1, 3)]),
    dtype=st.sampled_from(DTYPES),
    options=st.fixed_dictionaries(
        dict.fromkeys(("bias", "narrow_bias", "residual", "relu", "product"), st.booleans())
    ),
    skip=st.none() | st.tuples(*(st.integers(1, most) for most in (1, 3, 3, 4))),
    repeats=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_drawn(
    frames: Any,
    channels: Any,
    taps: Any,
    dtype: torch.dtype,
    options: dict[str, bool],
    skip: Any,
    repeats: bool,
    seed: int,
) -> None:
    if skip is not None and repeats:
        skip = (frames[1], *skip[1:])  # one frame of x_l for all
    case = draw((*frames, *channels, taps), dtype, skip=skip, seed=seed, **options)
    assert_as_good_as_the_chain(case)


def test_moments_far_from_zero_are_centred() -> None:
    """The variance of values about 1000, of which E[y²] - E[y]² would be 0.1 off."""
    for product in (True, False):
        case = draw((3, 2, 5, 5, 3, 5, POINT), torch.float32, bias=True, product=product)
        assert case.bias is not None
        y, moments = replace(case, bias=case.bias + 1000).run()
        assert y.mean() > 900
        assert_moments(y, moments)


def among_nan(tensor: Tensor) -> Tensor:
    """The same tensor in the middle of memory that is NaN."""
    memory = torch.full((tensor.numel() + 8192,), torch.nan, dtype=tensor.dtype, device=DEVICE)
    inner = memory[4096 : 4096 + tensor.numel()].view(tensor.shape)
    return inner.copy_(tensor)


@pytest.mark.parametrize("product", [True, False], ids=["convolve", "add_terms"])
def test_runs_are_bit_equal_and_read_nothing_that_is_not_theirs(product: bool) -> None:
    """The second run finds NaN around its arguments and in all memory that it allocates."""
    options: dict[str, Any] = {"bias": True, "residual": True, "skip": (2, 1, 2, 3)}
    case = draw((2, 2, 5, 7, 5, 7, (3, 1, 3)), torch.float32, product=product, **options)
    y, moments = case.run()
    torch.use_deterministic_algorithms(True)
    try:
        assert case.x.new_empty(3).isnan().all()
        again, moments_again = case.map(among_nan).run()
    finally:
        torch.use_deterministic_algorithms(False)
    for first, second in zip((y, *moments), (again, *moments_again), strict=True):
        assert torch.equal(first, second)


def test_nan_reaches_its_neighbours_only() -> None:
    """Of the last pixel, which places past the end of a tile read too."""
    case = draw((2, 3, 4, 4, 3, 5, SPATIAL), torch.float32)
    case.x[1, 1, 3, 3, 0] = torch.nan
    y, (mean, var) = case.run()
    expected = torch.zeros(y.shape, dtype=torch.bool, device=DEVICE)
    expected[1, 1, 2:, 2:] = True
    assert torch.equal(y.isnan(), expected)
    for statistic in (mean, var):
        assert statistic[1].isnan().all()
        assert statistic[[0, 2]].isfinite().all()


@pytest.mark.parametrize("relu", [False, True])
def test_nan_of_every_term_reaches_y(relu: bool) -> None:
    for product in (True, False):
        options: dict[str, Any] = {"bias": True, "residual": True, "skip": (1, 1, 1, 3)}
        options["relu"] = relu
        case = draw((1, 1, 2, 2, 3, 5, POINT), torch.float32, product=product, **options)
        assert case.skip is not None
        for term in (case.bias, case.residual, *case.skip):
            assert term is not None
            kept = term.clone()
            term.flatten()[0] = torch.nan
            y, _ = case.run(moments=False)
            assert y.flatten()[0].isnan()
            assert not y.isnan().all()
            term.copy_(kept)


@pytest.mark.parametrize("product", [True, False], ids=["convolve", "add_terms"])
def test_moments_change_nothing_else(product: bool) -> None:
    case = draw(SMALL, torch.float16, product=product, bias=True)
    y, nothing = case.run(moments=False)
    assert nothing is None
    assert torch.equal(y, case.run()[0])


def test_in_place_or_not() -> None:
    case = draw(SMALL, torch.float32, product=False, residual=True, bias=True)
    before = case.x.clone()
    y, moments = case.run()
    assert torch.equal(case.x, before)
    terms = case.bias, case.residual, None, True
    same, same_moments = epilogue.add_terms(case.x, *terms, in_place=True)
    assert same is case.x
    for got, expected in zip((same, *same_moments), (y, *moments), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("product", [True, False], ids=["convolve", "add_terms"])
@pytest.mark.parametrize("frames", [(0, 2, 4, 4), (2, 0, 4, 4), (2, 2, 0, 4)], ids=str)
def test_an_empty_video_has_no_moments(frames: Any, product: bool) -> None:
    case = draw((*frames, 3, 5, SPATIAL), torch.float32, product=product, bias=True)
    y, moments = case.run(moments=False)
    assert y.shape == (*frames, 5)
    assert moments is None
    with pytest.raises(ValueError, match="an empty video"):
        case.run(moments=True)


ones = torch.ones
DOUBLE = draw(SMALL, torch.float64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": ones(2, 4, 4, 5)}, r"x must be \[B, T, H, W, I\], not \[2, 4, 4, 5\]"),
        ({"weight": ones(6, 3, 3, 5)}, r"weight must be \[O, kt, kh, kw, I\]"),
        ({"weight": ones(6, 1, 3, 3, 4)}, r"weight must be \[O, kt, kh, kw, 5\]"),
        ({"weight": ones(6, 1, 2, 3, 5)}, r"\(1, 2, 3\) has no centre"),
        ({"weight": ones(0, 1, 3, 3, 5)}, "is empty"),
        ({"weight": ones(6, 1, 3, 3, 5).half()}, "weight is torch.float16, x is torch.float32"),
        ({"x": DOUBLE.x, "weight": DOUBLE.weight}, "fp32, fp16 or bf16, not torch.float64"),
        ({"x": ones(2, 4, 4, 5, 6).mT}, "x must be contiguous"),
        ({"bias": ones(5)}, r"bias must be \[6\], not \[5\]"),
        ({"residual": ones(2, 4, 4, 6, 5)}, r"residual must be \[2, 4, 4, 6, 6\]"),
        ({"residual": ones(2, 4, 2, 6, 6)}, r"residual must be .* upsampled, \[2, 4, 2, 3, 6\]"),
        ({"residual": ones(2, 4, 4, 6, 6).mT}, "residual must be contiguous"),
        ({"skip": (ones(1, 4, 4, 6, 3), ones(6, 3), ones(6))}, "skip's video"),
        ({"skip": (ones(2, 4, 4, 6, 3), ones(3, 6), ones(6))}, "skip's weight"),
        ({"skip": (ones(2, 4, 4, 6, 3), ones(6, 3), ones(3))}, "skip's bias"),
        ({"skip": (ones(2, 3, 4, 6, 3), ones(6, 3), ones(6))}, "4x6/3 video cannot be injected"),
        ({"skip": (ones(2, 4, 2, 6, 3), ones(6, 3), ones(6))}, "pixels only skipped"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(draw(SMALL, torch.float32), **change).run()


def test_too_many_pixels_are_refused() -> None:
    """On no device: what they are refused for is their shape."""

    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    x, weight = meta(2**11, 2**10, 32, 32, 1), meta(1, 1, 1, 1, 1)
    for case in (Case(x, weight), Case(x, None)):
        with pytest.raises(ValueError, match=r"has 2\^31 pixels or more"):
            case.run()
    x = meta(2, 1, 1, 1, 1)
    for video in (meta(2, 1, 2**15, 2**15, 1), meta(2, 1, 2**14, 2**14, 8)):
        skip = video, meta(1, video.shape[4]), meta(1)
        for case in (Case(x, weight, skip=skip), Case(x, None, skip=skip)):
            with pytest.raises(ValueError, match=r"x_l, .* has 2\^31 pixels or more"):
                case.run()


def test_copies_are_wide_and_under_way_during_products(tmp_path: Path) -> None:
    """Compiled for Hopper, without a GPU: all asynchronous copies are of 16 bytes, four per thread
    for a tile of x and four for one of W in each of three stages, and a product is waited for only
    when the next has been started. Narrower copies would be right, and some eight times slower.
    """
    script = (
        "import re\n"
        "from kernels.compiled.convolution import variants\n"
        "[wide] = [v for v in variants() if v.label == 'bf16 128x128x64']\n"
        "ptx = wide.compile('sm_90').asm['ptx']\n"
        "copies = re.findall(r'cp\\.async\\.c[ag]\\.shared\\.global [^;]*?(0x[0-9a-f]+)', ptx)\n"
        "print(len(copies), *set(copies))\n"
        "print(*re.findall(r'wgmma\\.wait_group\\S* +([1-9])', ptx))\n"
    )
    # A process of its own: this one may interpret kernels, and then cannot compile them.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.stdout.split("\n") == ["24 0x10", "1", ""], done.stdout + done.stderr


@pytest.mark.gpu
@needs_cuda
def test_bf16_on_a_gpu() -> None:
    large = (2, 3, 16, 16, 128, 256, SPATIAL), (4, 3, 4, 4, 512, 256, TEMPORAL)
    for size in (*SIZES.values(), *large):
        assert_as_good_as_the_chain(draw(size, torch.bfloat16))
    for product in (True, False):
        for options in OPTIONS.values():
            assert_as_good_as_the_chain(draw(SMALL, torch.bfloat16, product=product, **options))


@pytest.mark.gpu
@needs_cuda
def test_more_than_2_to_the_31_values() -> None:
    """The last frames lie past int32 offsets; they must be as the first, which are equal."""
    x = torch.randn(1, 1, 512, 512, 64, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(64, 1, 3, 3, 64, device="cuda", dtype=torch.bfloat16)
    x = x.expand(1, 129, -1, -1, -1).contiguous()
    assert x.numel() > 2**31
    y, (mean, var) = convolution.convolve(x, weight, None, x, None, True)
    alone, _ = convolution.convolve(
        x[:, :1].contiguous(), weight, None, x[:, :1].contiguous(), None, False
    )
    total, totals = epilogue.add_terms(x, None, x, None, True)
    assert torch.equal(alone, y[:, :1])
    for result in (y, total, mean[None], var[None], totals[0][None], totals[1][None]):
        assert all(torch.equal(result[:, t], result[:, 0]) for t in (64, 128))
        assert result[:, 0].abs().max() > 0
