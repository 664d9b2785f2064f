"""PyTorch's convolution for `kernels.convolution.fused`, its gradients, and the terms after it.

Shapes as there: x is rows [B, T, S, I], contiguous, W [O, a, b, I] (of volumes [O, t, h, w, I]) as
it is kept.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.common.large_batches import Gradients, gradients_in_parts, in_parts
from kernels.common.layout import channels_last, fold_frames
from kernels.convolution.terms import LowSkip, add_projected_, add_upsampled_


class Layout(NamedTuple):
    """What a convolution slides over, and how; it pads with zeros to the same size, or to the size
    of what it resamples to."""

    size: tuple[int, int]
    """H, W of x."""
    columns: bool = False
    """Over time and [H·W] instead of over H and W."""
    upsample: bool = False
    """Transposed, 4x4 with stride 2: `folding.upsampling_kernel`'s."""
    volume: bool = False
    """Over time, H and W at once: W is [O, t, h, w, I]."""
    pooling: tuple[int, int, int] = (1, 1, 1)
    """Stride over frames, rows and columns, of `folding.pooling_kernel`'s, which have a tap more
    along those that are 2."""

    @property
    def out_size(self) -> tuple[int, int]:
        """H, W of y."""
        scale = 2 if self.upsample else 1
        return scale * self.size[0] // self.pooling[1], scale * self.size[1] // self.pooling[2]

    @property
    def resamples(self) -> bool:
        """Whether y is of another size or length than x."""
        return self.upsample or self.pooling != (1, 1, 1)

    def out_frames(self, num_frames: int) -> int:
        """T of y."""
        return num_frames // self.pooling[0]


def convolution(
    layout: Layout, x_BTSI: Tensor, weight_OabI: Tensor, bias_O: Tensor | None
) -> Tensor:
    """W * x + b, [B, T', S', O]; differentiable."""
    image = _as_image(layout, layout.size, x_BTSI)
    return _as_rows(layout, _convolve_image(layout, image, weight_OabI, bias_O), x_BTSI)


def convolve_video(
    layout: Layout,
    x_BTIHW: Tensor,
    weight_OabI: Tensor,
    bias_O: Tensor | None,
    residual_BTOHW: Tensor | None,
    relu: bool,
) -> Tensor:
    """[relu of] W * x + b [+ residual], [B, T', O, H', W']; differentiable.

    By few operators: small videos take a CPU as long as it takes to call them.
    """
    image = _video_as_image(layout, x_BTIHW)
    y = _convolve_image(layout, image, weight_OabI, bias_O)
    # As what comes next will have it and keep it, a ReLU's gradient too.
    rows = torch.channels_last_3d if layout.volume else torch.channels_last
    y = y.contiguous(memory_format=rows)
    # In place: new memory costs a CPU more than the arithmetic. And before y is a view, to whose
    # change autograd answers with copies of the whole.
    if residual_BTOHW is not None:
        y = y.add_(_video_as_image(layout, residual_BTOHW))
    if relu:
        y = F.relu(y, inplace=True)
    if layout.columns:
        y = y.unflatten(3, layout.size)
    over_time = layout.volume or layout.columns
    return y.transpose(1, 2) if over_time else y.unflatten(0, x_BTIHW.shape[:2])


def _convolve_image(
    layout: Layout, image: Tensor, weight_OabI: Tensor, bias_O: Tensor | None
) -> Tensor:
    kernel = _as_kernel(layout, weight_OabI)
    stride, padding, *_ = _numbers(layout, weight_OabI)

    def convolve(part: Tensor) -> Tensor:
        if layout.volume:
            return convolve_volume(part, kernel, bias_O, stride=stride, padding=padding)
        # Not aten's operator by name, which on a CPU is called 25 µs more slowly.
        operator = F.conv_transpose2d if layout.upsample else F.conv2d
        return operator(part, kernel, bias_O, stride, padding)

    over_time = layout.volume or layout.columns
    num_frames = layout.out_frames(image.shape[2]) if over_time else 1
    y_values = len(image) * num_frames * math.prod(layout.out_size) * len(weight_OabI)
    return in_parts(convolve, image, y_values)


def convolve_volume(
    x_BITHW: Tensor,
    weight_OIthw: Tensor,
    bias_O: Tensor | None,
    *,
    stride: Sequence[int] = (1, 1, 1),
    padding: Sequence[int],
) -> Tensor:
    """`F.conv3d`, but on a CPU in fp32 whatever the dtype.

    oneDNN's bf16 weight gradient is uninitialised memory for some shapes, such as the matching
    discriminator's 6 channels and 2 frames (torch 2.13; see tests/kernels/test_convolutions.py).
    """
    if not _too_narrow(x_BITHW):
        return F.conv3d(x_BITHW, weight_OIthw, bias_O, stride=stride, padding=padding)
    bias_O = None if bias_O is None else bias_O.float()
    y_BOTHW = F.conv3d(
        x_BITHW.float(), weight_OIthw.float(), bias_O, stride=stride, padding=padding
    )
    return y_BOTHW.to(x_BITHW.dtype)


def _too_narrow(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)


def sums_weight_over_frames(layout: Layout, x: Tensor) -> bool:
    """Whether `gradients` takes a volume's weight gradient over single frames.

    oneDNN takes a strided volume's by a copy of x for every tap: on one core of an AMD EPYC 2.5 to
    3 times as slowly at the sample configuration's sizes, 1.0 to 1.5 times at 32 to 192 channels.
    Without a stride oneDNN is the faster at the latter.
    """
    return layout.volume and x.device.type == "cpu" and layout.pooling == (1, 2, 2)


def gradients(
    layout: Layout,
    dy_BTSO: Tensor,
    x_BTSI: Tensor,
    weight_OabI: Tensor,
    wanted: tuple[bool, bool, bool],
) -> Gradients:
    """Of x, the weight and the bias."""
    dtype = x_BTSI.dtype
    if layout.volume and _too_narrow(x_BTSI):
        dy_BTSO, x_BTSI, weight_OabI = dy_BTSO.float(), x_BTSI.float(), weight_OabI.float()
    over_frames = wanted[1] and sums_weight_over_frames(layout, x_BTSI)
    # A bias's alone would be taken together with the weight's: all of its work.
    at_once = (wanted[0], False, False) if over_frames else wanted

    def differentiate(dy: Tensor, image: Tensor) -> Gradients:
        kernel, num_channels = _as_kernel(layout, weight_OabI), len(weight_OabI)
        found: Gradients = torch.ops.aten.convolution_backward.default(
            dy, image, kernel, [num_channels], *_numbers(layout, weight_OabI), list(at_once)
        )
        return found

    dx, dkernel, dbias = gradients_in_parts(
        differentiate,
        _as_image(layout, layout.out_size, dy_BTSO),
        _as_image(layout, layout.size, x_BTSI),
    )
    if over_frames:
        dkernel, dbias = _weight_gradient_over_frames(
            layout, dy_BTSO, x_BTSI, weight_OabI, wanted[2]
        )
    if x_BTSI.dtype != dtype:
        dx, dkernel, dbias = (None if v is None else v.to(dtype) for v in (dx, dkernel, dbias))
    as_kept: tuple[int, ...] = (1, 2, 3, 0) if layout.upsample else (0, 2, 3, 1)
    as_kept = (0, 2, 3, 4, 1) if layout.volume else as_kept
    return (
        None if dx is None else _as_rows(layout, dx, x_BTSI),
        None if dkernel is None else dkernel.permute(as_kept),
        dbias,
    )


def _weight_gradient_over_frames(
    layout: Layout, dy_BTSO: Tensor, x_BTSI: Tensor, weight_OthwI: Tensor, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Of a volume's weight, as [O, I, t, h, w], and its bias: one convolution's over single frames.

    Its output channels are those of every tap over time, side by side: a tap that reads frames
    `lead` after y's own meets dy that many frames later, and none where y has no such frame.
    """
    O, taps, *size, I = weight_OthwI.shape  # noqa: E741
    B, T, S, _ = dy_BTSO.shape
    dy_BTStO = dy_BTSO.new_zeros(B, T, S, taps, O)
    for tap in range(taps):
        lead = tap - taps // 2
        first, last = max(lead, 0), T + min(lead, 0)
        dy_BTStO[:, first:last, :, tap] = dy_BTSO[:, first - lead : last - lead]
    frames = layout._replace(volume=False)
    weight = weight_OthwI.new_empty(taps * O, *size, I)
    wanted = False, True, with_bias
    _, dkernel, dbias = gradients(frames, dy_BTStO.flatten(3), x_BTSI, weight, wanted)
    assert dkernel is not None
    dkernel = dkernel.view(taps, O, *size, I).permute(1, 4, 0, 2, 3)
    return dkernel, None if dbias is None else dbias.view(taps, O)[taps // 2]


def add_terms_(
    y_BTSO: Tensor,
    residual_BTSO: Tensor | None,
    skip: LowSkip | None,
    size: tuple[int, int],
    relu: bool,
) -> None:
    """In place and without derivatives; a residual of a quarter of y's pixels is upsampled."""
    if residual_BTSO is not None and residual_BTSO.shape == y_BTSO.shape:
        changeable(y_BTSO).add_(residual_BTSO)
    elif residual_BTSO is not None:
        add_upsampled_(y_BTSO, residual_BTSO, size)
    if skip is not None:
        add_projected_(as_video(y_BTSO, size), skip)
    if relu:
        changeable(y_BTSO).relu_()


def changeable(y: Tensor) -> Tensor:
    """A view, to change y in place by where y is the result of an autograd Function.

    torch 2.11's compiler gives the Function's inputs a gradient of zero where an operator gave back
    the very result that it was given, as one in place does.
    """
    return y.view_as(y)


def as_video(y_BTSC: Tensor, size: tuple[int, int]) -> Tensor:
    """Rows as [B, T, C, H, W], a view."""
    B, T, _, C = y_BTSC.shape
    return y_BTSC.view(B, T, *size, C).permute(0, 1, 4, 2, 3)


def _numbers(layout: Layout, weight_OabI: Tensor) -> tuple[Any, ...]:
    """Stride, padding, dilation, transposed, output padding and groups."""
    if layout.upsample:
        return [2, 2], [1, 1], [1, 1], True, [0, 0], 1
    taps = weight_OabI.shape[1:-1]
    stride = layout.pooling[-len(taps) :]
    padding = [(size - 1) // 2 for size in taps]
    return [*stride], padding, [1] * len(taps), False, [0] * len(taps), 1


def _as_image(layout: Layout, size: tuple[int, int], x_BTSC: Tensor) -> Tensor:
    """A channels-last view: frames [B*T, C, H, W], a volume [B, C, T, H, W], or [B, C, T, S]."""
    B, T, _, C = x_BTSC.shape
    if layout.volume:
        return x_BTSC.reshape(B, T, *size, C).permute(0, 4, 1, 2, 3)
    image = x_BTSC if layout.columns else x_BTSC.reshape(B * T, *size, C)
    return image.permute(0, 3, 1, 2)


def _video_as_image(layout: Layout, x_BTCHW: Tensor) -> Tensor:
    """As `_as_image`."""
    if layout.columns:
        return channels_last(x_BTCHW).transpose(1, 2).flatten(3)
    return channels_last(x_BTCHW).transpose(1, 2) if layout.volume else fold_frames(x_BTCHW)


def _as_rows(layout: Layout, y_NChw: Tensor, like_BTSC: Tensor) -> Tensor:
    """[B, T', S', C], contiguous again."""
    if layout.volume:
        return y_NChw.permute(0, 2, 3, 4, 1).contiguous().flatten(2, 3)
    B, T, _, _ = like_BTSC.shape
    _, C, height, width = y_NChw.shape
    num_pixels = width if layout.columns else height * width
    return y_NChw.permute(0, 2, 3, 1).contiguous().view(B, T, num_pixels, C)


def _as_kernel(layout: Layout, weight_OabI: Tensor) -> Tensor:
    """PyTorch's [O, I, a, b], of a transposed convolution [I, O, a, b], of a volume's 3 axes."""
    if layout.volume:
        return weight_OabI.permute(0, 4, 1, 2, 3)
    return weight_OabI.permute((3, 0, 1, 2) if layout.upsample else (0, 3, 1, 2))
