"""Convolutions with a norm before and terms after them, by name, for the tests of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kernels
from kernels.convolution.folding import fold
from kernels.convolution.fused import convolve
from kernels.convolution.pytorch import Layout

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
B, T, H, W = 2, 4, 4, 6
IN, OUT = 5, 6
Tensors = dict[str, Tensor]


class Size(NamedTuple):
    """Of x [B, T, I, H, W] and O output channels."""

    B: int = B
    T: int = T
    I: int = IN  # noqa: E741
    O: int = OUT  # noqa: E741
    H: int = H
    W: int = W
    low: tuple[int, int, int] = (2, 2, 1)
    """Frames of x per frame of x_l, rows and columns of x_l per row and column of x."""


def draw(
    names: list[str],
    taps: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    pooling: tuple[int, int, int] = (1, 1, 1),
    size: Size = Size(),  # noqa: B008
) -> Tensors:
    """Everything that `names` asks for besides x, the weights and the bias."""
    random = torch.Generator().manual_seed(seed)
    B, T, IN, OUT, H, W, (frames, rows, columns) = size
    shapes: dict[str, tuple[int, ...]] = {
        "x": (B, T, IN, H, W),
        "weight": (OUT, *taps, IN),
        "spatial": (OUT, 3, 3, OUT),
        "bias": (OUT,),
        "gain": (B, IN),
        "shift": (B, IN),
        "mean": (T, IN),
        "var": (T, IN),
        "residual": (B, T // pooling[0], OUT, H // pooling[1], W // pooling[2]),
        "shortcut": (B, T, IN, H // 2, W // 2),
        "projection": (OUT, 1, 1, IN),
        "projection_bias": (OUT,),
        "low": (B, T // frames, 3, rows * H, columns * W),
        "low_weight": (OUT, 1, 1, 3),
        "low_bias": (OUT,),
    }
    drawn = {k: torch.randn(shapes[k], generator=random, dtype=torch.float64) for k in names}
    if "var" in drawn:
        drawn["var"] = drawn["var"].square() + 0.5
    return {name: value.to(DEVICE, dtype) for name, value in drawn.items()}


def run(kind: str, tensors: Tensors, implementation: str | None = None) -> Tensor:
    """The operator `kind` on whatever of its inputs are there."""
    y = run_operator(kind, tensors, implementation)
    return y if isinstance(y, Tensor) else y.video


def run_operator(
    kind: str, tensors: Tensors, implementation: str | None
) -> Tensor | kernels.Measured:
    """As `run`, with what an operator behind a norm returns besides."""
    x: Any = tensors["x"]
    if "gain" in tensors:
        statistics = (tensors["mean"], tensors["var"]) if "mean" in tensors else None
        x = kernels.Normalized(x, tensors["gain"], tensors["shift"], statistics)
    bias = tensors.get("bias")
    if kind == "upsample":
        return kernels.upsample_conv(x, tensors["weight"], bias, implementation=implementation)
    if kind in POOLINGS:
        return pooled(kind, tensors, implementation)
    skip = None
    if "low" in tensors:
        skip = kernels.LowSkip(*(tensors[k] for k in ("low", "low_weight", "low_bias")))
    residual: Any = tensors.get("residual")
    if "shortcut" in tensors:
        residual = kernels.UpsampledShortcut(*(tensors[k] for k in SHORTCUT))
    terms: dict[str, Any] = {"residual_BTOHW": residual, "skip": skip}
    if kind == "separable":
        weights = tensors["weight"], tensors["spatial"]
        return kernels.separable_conv3d(x, *weights, bias, **terms, implementation=implementation)
    terms |= {"relu": "relu" in kind, "implementation": implementation}
    if "3x3x3" in kind:
        del terms["skip"]
        return kernels.conv3d(x, tensors["weight"], bias, **terms)
    return kernels.conv2d(x, tensors["weight"], bias, **terms)


def pooled(kind: str, tensors: Tensors, implementation: str | None) -> Tensor:
    """By the public function, or by the implementation of the convolution that is named."""
    x, weight, bias = tensors["x"], tensors["weight"], tensors.get("bias")
    residual, pooling = tensors.get("residual"), POOLINGS[kind]
    if implementation not in (None, "reference"):
        volume = kind != "pool 2d"
        kernel = fold(weight, pooling if volume else pooling[1:]).to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        layout = Layout((x.shape[3], x.shape[4]), volume=volume, pooling=pooling)
        return convolve(x, kernel, bias, layout, residual=residual, implementation=implementation)[
            0
        ]
    if kind == "pool 2d":
        return kernels.conv_pool2d(
            x, weight, bias, residual_BTOHW=residual, implementation=implementation
        )
    return kernels.conv_pool3d(
        x, weight, bias, residual_BTOHW=residual, pooling=pooling, implementation=implementation
    )


NORM, GIVEN = ["gain", "shift"], ["gain", "shift", "mean", "var"]
LOW = ["low", "low_weight", "low_bias"]
TERMS = ["residual", *LOW]
SHORTCUT = ["shortcut", "projection", "projection_bias"]
POOLINGS: dict[str, kernels.Pooling] = {
    "pool 2d": (1, 2, 2),
    "pool 3d": (1, 2, 2),
    "pool 3d, time too": (2, 2, 2),
}
KINDS = {
    "conv 3x3": (3, 3),
    "conv 1x1": (1, 1),
    "separable": (3,),
    "upsample": (3, 3),
    "relu 3x3": (3, 3),
    "conv 3x3x3": (3, 3, 3),
    "relu 3x3x3": (3, 3, 3),
    **{kind: (3, 3) if kind == "pool 2d" else (3, 3, 3) for kind in POOLINGS},
}


def terms_of(kind: str) -> list[str]:
    """All that the operator may add."""
    if kind == "upsample":
        return []
    return ["residual"] if "3x3x3" in kind or kind in POOLINGS else TERMS


def follows_norm(kind: str) -> bool:
    """Whether a norm may be in front: discriminators, which pool and see volumes, have none."""
    return kind not in POOLINGS and "3x3x3" not in kind


def choices_of_terms(kind: str) -> list[list[str]]:
    """Nothing, all, and in place of a residual a shortcut."""
    shortcuts = [SHORTCUT, [*SHORTCUT, *LOW]] if kind in ("conv 3x3", "relu 3x3") else []
    return [[], *([terms_of(kind)] if terms_of(kind) else []), *shortcuts]


CASES = [
    (kind, [*norm, *terms])
    for kind in KINDS
    for norm in (([], NORM, GIVEN) if follows_norm(kind) else [[]])
    for terms in choices_of_terms(kind)
]


def case(kind: str, more: list[str], **options: Any) -> Tensors:
    spatial = ["spatial"] if kind == "separable" else []
    options["pooling"] = POOLINGS.get(kind, (1, 1, 1))
    return draw(["x", "weight", *spatial, "bias", *more], KINDS[kind], **options)


def gradients(
    function: Callable[[Tensors], Tensor], tensors: Tensors, *, whole: bool = False
) -> Tensors:
    """y, and the gradient of everything from a random upstream, of `whole` numbers if wanted."""
    leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}
    y = function(leaves)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    upstream = (in_whole_numbers(upstream) if whole else upstream).to(y)
    grads = torch.autograd.grad(y, list(leaves.values()), upstream)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def in_whole_numbers(values: Tensor) -> Tensor:
    """Normal ones as a few small whole numbers: sums of their products are exact in any order."""
    return (2 * values).round()


def plain(kind: str, tensors: Tensors) -> Tensor:
    """Operator by operator, through autograd."""
    with kernels.use("reference"):
        return run(kind, tensors)
