"""Nearest-neighbour 2x upsampling in space, then a 3x3 convolution.

y = W * up(x) + b, the first half of a generator's upsampling block (SSW-GAN; BigGAN).

Shapes: B batch, T frames, I input and O output channels, H x W input pixels, outputs 2H x 2W.
Weights [O, 3, 3, I], kept in fp32: they are folded as they come, then cast to the dtype of x. A
weight [O, 4, 4, I] is one that is folded already (`kernels.convolution.folding.upsampling_kernel`).

up(x) repeats every pixel four times, so the taps of W that meet the same pixel are summed first.
FLOPs per input pixel, in units of I·O, and what is written:

| form       | FLOPs       | besides y              |
|------------|-------------|------------------------|
| reference  | 72          | up(x), once            |
| transposed | 32          | nothing                |
| shuffled   | 32·(1+1/H)² | y in four phases, once |

All are the same function, with derivatives of any order. The 1x1 convolution of the same block's
shortcut is in `upsampled_shortcut`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.common.layout import conv2d_weight, fold_frames, unfold_frames
from kernels.convolution.folding import phase_kernels, upsampling_kernel
from kernels.convolution.fused import Moments, Normalized, convolve, size_of, source_of, value_of
from kernels.convolution.pytorch import Layout
from kernels.dispatch import AUTO, REFERENCE, Implementation, Operator, everywhere

# (device, least input channels, form): what "auto" runs, the last row that fits. On a CPU the
# transposed form wins at every size that was measured, see benchmarks/NOTES.md. On CUDA neither
# has been measured yet: it has the fewer FLOPs and bytes.
TABLE = (
    ("cpu", 1, "transposed"),
    ("cuda", 1, "transposed"),
)

_OPERATOR = Operator(
    "upsample_conv",
    Implementation("transposed", everywhere),
    Implementation("shuffled", everywhere),
)


def upsample_conv_reference(
    x_BTIHW: Tensor, weight_OhwI: Tensor, bias_O: Tensor | None = None
) -> Tensor:
    """As the equation stands; returns [B, T, O, 2H, 2W]."""
    weight, bias = weight_OhwI.to(x_BTIHW.dtype), _cast(bias_O, x_BTIHW.dtype)
    if is_folded(weight):
        kernel_IOhw = weight.permute(3, 0, 1, 2)
        frames = F.conv_transpose2d(fold_frames(x_BTIHW), kernel_IOhw, bias, stride=2, padding=1)
        return unfold_frames(frames, x_BTIHW.shape[1])
    upsampled = F.interpolate(fold_frames(x_BTIHW), scale_factor=2.0, mode="nearest")
    frames = F.conv2d(upsampled, conv2d_weight(weight), bias, padding=1)
    return unfold_frames(frames, x_BTIHW.shape[1])


def upsample_conv(
    x_BTIHW: Tensor | Normalized,
    weight_OhwI: Tensor,
    bias_O: Tensor | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """Upsample every frame and convolve it; returns [B, T, O, 2H, 2W] in the dtype of x.

    `impl` is "transposed", "shuffled" or "reference". Raises ValueError for a weight that is
    neither 3x3 nor, folded already, 4x4.
    """
    y_BTOHW, _ = _upsample_conv(x_BTIHW, weight_OhwI, bias_O, moments=False, impl=impl)
    return y_BTOHW


def upsample_conv_with_moments(
    x_BTIHW: Tensor | Normalized,
    weight_OhwI: Tensor,
    bias_O: Tensor | None = None,
    *,
    wanted: bool = True,
) -> tuple[Tensor, Moments | None]:
    """As `upsample_conv`, and the moments of the result if `wanted` and where they cost little."""
    return _upsample_conv(x_BTIHW, weight_OhwI, bias_O, moments=wanted, impl=None)


def _upsample_conv(
    x_BTIHW: Tensor | Normalized,
    weight_OhwI: Tensor,
    bias_O: Tensor | None,
    *,
    moments: bool,
    impl: str | None,
) -> tuple[Tensor, Moments | None]:
    if weight_OhwI.shape[1:3] not in ((3, 3), (4, 4)):
        raise ValueError(
            f"the weight must be 3x3 or folded 4x4, not {tuple(weight_OhwI.shape[1:3])}"
        )
    video = source_of(x_BTIHW)
    chosen = _OPERATOR.choose(impl, video.device, video.dtype)
    if chosen == REFERENCE:
        return upsample_conv_reference(value_of(x_BTIHW), weight_OhwI, bias_O), None
    if impl in (None, AUTO):
        chosen = _best_form(video.device, video.shape[2])
    if chosen == "transposed":
        kernel = weight_OhwI if is_folded(weight_OhwI) else upsampling_kernel(weight_OhwI)
        kernel, bias_O = kernel.to(video.dtype), _cast(bias_O, video.dtype)
        layout = Layout(size_of(x_BTIHW), upsample=True)
        return convolve(x_BTIHW, kernel, bias_O, layout, moments=moments)
    frames = fold_frames(value_of(x_BTIHW))
    y = _shuffled(frames, weight_OhwI, _cast(bias_O, frames.dtype))
    return unfold_frames(y, video.shape[1]), None


def _best_form(device: torch.device, num_channels: int) -> str:
    kind = "cpu" if device.type == "cpu" else "cuda"  # meta tensors stand for those of a GPU
    return [form for where, least, form in TABLE if where == kind and num_channels >= least][-1]


def is_folded(weight_OhwI: Tensor) -> bool:
    """Whether upsampling is in the weight already."""
    return weight_OhwI.shape[1:3] == (4, 4)


def _shuffled(x_NIHW: Tensor, weight_OhwI: Tensor, bias_O: Tensor | None) -> Tensor:
    kernel = phase_kernels(weight_OhwI).to(x_NIHW.dtype)
    biases = None if bias_O is None else bias_O.repeat(4)
    y: Tensor = _Interleave.apply(F.conv2d(x_NIHW, conv2d_weight(kernel), biases, padding=1))
    return y


class _Interleave(torch.autograd.Function):
    """Phases [N, 2*2*O, H+1, W+1] → [N, O, 2H, 2W], y[2i+q, 2j+r] = phase(q, r)[i+q, j+r].

    A copy that leaves out each phase's first or last row and column. By itself autograd would
    make and add four gradients of the size of the phases.
    """

    @staticmethod
    def forward(ctx: Any, phases: Tensor) -> Tensor:
        N, channels, height, width = phases.shape
        y = phases.new_empty(N, height - 1, 2, width - 1, 2, channels // 4)
        for target, source in _phases(y, phases):
            target.copy_(source)
        return y.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _Deinterleave.apply(*grads)


class _Deinterleave(torch.autograd.Function):
    """The adjoint: [N, O, 2H, 2W] → phases [N, 2*2*O, H+1, W+1], 0 where a phase has no pixel."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        N, channels, height, width = y.shape
        height, width = height // 2, width // 2
        phases = y.new_zeros(N, height + 1, width + 1, 4 * channels).permute(0, 3, 1, 2)
        y_NHqWrO = y.permute(0, 2, 3, 1).unflatten(2, (width, 2)).unflatten(1, (height, 2))
        for source, target in _phases(y_NHqWrO, phases):
            target.copy_(source)
        return phases

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _Interleave.apply(*grads)


def _phases(y_NHqWrO: Tensor, phases: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Views of the same pixels in both: each phase's part of y and of the convolution's output."""
    height, width = y_NHqWrO.shape[1], y_NHqWrO.shape[3]
    phases_NHWqrO = phases.permute(0, 2, 3, 1).unflatten(3, (2, 2, -1))
    return [
        (y_NHqWrO[:, :, q, :, r], phases_NHWqrO[:, q : q + height, r : r + width, q, r])
        for q in (0, 1)
        for r in (0, 1)
    ]


def _cast(bias_O: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias_O is None else bias_O.to(dtype)
