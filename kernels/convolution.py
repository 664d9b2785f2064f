r"""One convolution with all that stands before and after it, and what it keeps for backward.

y = W * a + b [+ residual] [+ projected x_l],   a = x or relu(norm(x))

The operators `conv2d`, `separable_conv3d` and `upsample_conv` are this with different W. A norm
and its ReLU in front are not kept: the backward pass makes `a` again from x and the statistics,
elementwise, so a convolution behind a norm keeps x, which the norm needs anyway, where autograd
would keep x and a. The residual and y are not kept at all.

Shapes: B batch, T frames, S = H·W pixels, I input and O output channels; x is rows [B, T, S, I],
contiguous. W is [O, a, b, I] over two axes, rows and columns of a frame or (`Layout.columns`) time
and all pixels. Bytes per element in bf16, kept: 2 for x (shared with whatever else keeps x).
Moved: x and y once each by the convolution, and by what surrounds it

| implementation | prologue | bias, residual, x_l, moments of y             |
|----------------|----------|-----------------------------------------------|
| triton         | a: 4     | in the convolution's epilogue: residual once  |
| epilogue       | a: 4     | one pass over y: 4, residual 2                |
| pytorch        | a: 4     | a pass each                                   |

Derivatives of order two and higher are those of the composition of differentiable operators.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from kernels import frame_norm as norms
from kernels.implementation import (
    REFERENCE,
    Implementation,
    Operator,
    everywhere,
)
from kernels.low_skip import LowSkip, add_low_skip, add_projected_, low_skip_gradients

Moments = tuple[Tensor, Tensor]
"""Mean and biased variance per (time step, channel), [T, C] each, without a gradient."""

OPERATOR = Operator("convolution", Implementation("pytorch", everywhere))


@dataclass(frozen=True)
class Normalized:
    """relu(norm(x)), not computed yet: a convolution that is given it need not keep it.

    Fields as the arguments of `kernels.frame_norm`. `moments` are x's own, by whoever made x.
    """

    video: Tensor
    gain: Tensor
    bias: Tensor
    statistics: tuple[Tensor, Tensor] | None = None
    group: dist.ProcessGroup | None = None
    moments: Moments | None = None

    def value(self) -> Tensor:
        """The video itself."""
        return norms.apply(*self.prepare(), self.video.shape[3:])

    def prepare(self) -> tuple[norms.Tensors, norms.Form]:
        """Arguments of `frame_norm.frame_normalize`."""
        return norms.prepare(
            self.video,
            self.gain,
            self.bias,
            relu=True,
            eps=norms.EPSILON,
            statistics=self.statistics,
            group=self.group,
            impl=None,
            moments=self.moments,
        )


class Layout(NamedTuple):
    """What a convolution slides over, and how; it pads with zeros to the same size."""

    size: tuple[int, int]
    """H, W of x."""
    columns: bool = False
    """Over time and [H·W] instead of over H and W."""
    upsample: bool = False
    """Transposed, 4x4 with stride 2: `folding.upsampling_kernel`'s."""

    def out(self) -> "Layout":
        """Of y."""
        scale = 2 if self.upsample else 1
        return self._replace(size=(scale * self.size[0], scale * self.size[1]))


def source_of(x: Tensor | Normalized) -> Tensor:
    """The tensor that exists: x itself, or what is to be normalised."""
    return x.video if isinstance(x, Normalized) else x


def value_of(x: Tensor | Normalized) -> Tensor:
    """x as a tensor."""
    return x.value() if isinstance(x, Normalized) else x


def convolve(
    x_BTIHW: Tensor | Normalized,
    weight_OabI: Tensor,
    bias_O: Tensor | None,
    layout: Layout,
    *,
    residual_BTOHW: Tensor | None = None,
    skip: LowSkip | None = None,
    impl: str | None = None,
) -> Tensor:
    """Returns [B, T, O, H', W'] in the dtype of x, channels last in memory.

    Raises ValueError for an x_l that does not fit.
    """
    video = source_of(x_BTIHW)
    impl = OPERATOR.choose(impl, video.device, video.dtype)
    norm_tensors: Sequence[Tensor | None]
    form: norms.Form | None
    if isinstance(x_BTIHW, Normalized):
        norm_tensors, form = x_BTIHW.prepare()
    else:
        norm_tensors, form = (norms.rows(video), None, None, None, None), None
    residual = None if residual_BTOHW is None else norms.rows(residual_BTOHW)
    tensors = *norm_tensors, weight_OabI, bias_O, residual, *(skip or (None, None, None))
    if impl == REFERENCE or (form is not None and form.impl == REFERENCE):
        y_BTSO = _compose(layout, form, tensors)
    else:
        y_BTSO = _Convolution.apply(layout, form, impl, *tensors)
    return _as_video(y_BTSO, layout.out())


# ------------------------------------------------------------------------------- autograd


class _Convolution(torch.autograd.Function):
    """Composed of PyTorch's convolution and our operators, which counters and compilers see.

    Arguments: layout, form and implementation; then x, the norm's four, W, b, residual, and x_l's
    video, weight and bias, as many of them as there are, else None.
    """

    @staticmethod
    def forward(
        ctx: Any, layout: Layout, form: norms.Form | None, impl: str, *tensors: Any
    ) -> Tensor:
        *norm_tensors, weight, bias, residual, video, low_weight, low_bias = tensors
        ctx.layout, ctx.form = layout, form
        # Biases may be parameters, which ZeRO-3 empties before the backward pass: kept by size.
        ctx.bias_sizes = [None if v is None else v.shape for v in (bias, low_bias)]
        ctx.save_for_backward(*norm_tensors, weight, video, low_weight)
        a = _prologue(form, norm_tensors)
        y_BTSO = _plain(layout, a, weight, bias)
        if residual is not None:
            y_BTSO += residual
        if video is not None:
            add_projected_(_as_video(y_BTSO, layout.out()), LowSkip(video, low_weight, low_bias))
        return y_BTSO

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        [dy] = grads
        layout, form, wants = ctx.layout, ctx.form, ctx.needs_input_grad[3:]
        *norm_tensors, weight, video, low_weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # a graph of the backward pass is wanted
            biases = [None if size is None else dy.new_zeros(size) for size in ctx.bias_sizes]
            tensors = *norm_tensors, weight, biases[0], None, video, low_weight, biases[1]
            return None, None, None, *_differentiable_gradients(layout, form, tensors, dy, wants)
        dy = dy.contiguous()
        found: list[Tensor | None] = [None] * 11
        through_x = any(wants[:5])
        da, found[5], found[6] = _plain_gradients(
            layout, dy, _prologue(form, norm_tensors), weight, (through_x, wants[5], wants[6])
        )
        if form is None:
            found[0] = da
        elif da is not None:
            found[:5] = norms.gradients(da, norm_tensors, form, wants[:5])
        found[7] = dy if wants[7] else None
        if any(wants[8:]):
            dy_BTOHW = _as_video(dy, layout.out())
            found[8:] = low_skip_gradients(dy_BTOHW, video, low_weight, wants[8:])
        return None, None, None, *found


def _prologue(form: norms.Form | None, norm_tensors: Sequence[Any]) -> Tensor:
    if form is None:
        x_BTSI: Tensor = norm_tensors[0]
        return x_BTSI
    return norms.frame_normalize(*norm_tensors, None, *form)


def _differentiable_gradients(
    layout: Layout,
    form: norms.Form | None,
    tensors: Sequence[Any],
    dy_BTSO: Tensor,
    wants: Sequence[bool],
) -> list[Tensor | None]:
    """Those of `_compose`, which have derivatives; the residual's is dy."""
    wanted = [i for i, wants_it in enumerate(wants) if wants_it and i != 7]
    leaves = [tensors[i].requires_grad_() for i in wanted]
    if form is not None:
        tensors = *norms.with_own_statistics(tensors[:5], form), *tensors[5:]
    grads = torch.autograd.grad(
        _compose(layout, form, tensors), leaves, dy_BTSO, create_graph=True, allow_unused=True
    )
    found = dict(zip(wanted, grads, strict=True)) | {7: dy_BTSO if wants[7] else None}
    return [found.get(i) for i in range(11)]


def _compose(layout: Layout, form: norms.Form | None, tensors: Sequence[Any]) -> Tensor:
    """The equation in differentiable operators, of what `_Convolution` takes."""
    *norm_tensors, weight, bias, residual, video, low_weight, low_bias = tensors
    a = norm_tensors[0] if form is None else norms.differentiable(norm_tensors, form)
    y_BTSO = _plain(layout, a, weight, bias)
    y_BTSO = y_BTSO if residual is None else y_BTSO + residual
    if video is None:
        return y_BTSO
    y_BTOHW = _as_video(y_BTSO, layout.out())
    return norms.rows(add_low_skip(y_BTOHW, LowSkip(video, low_weight, low_bias)))


# --------------------------------------------------------------------- PyTorch's convolution


def _plain(layout: Layout, a_BTSI: Tensor, weight_OabI: Tensor, bias_O: Tensor | None) -> Tensor:
    y = torch.ops.aten.convolution.default(
        _as_image(layout, a_BTSI), _as_kernel(layout, weight_OabI), bias_O,
        *_numbers(layout, weight_OabI),
    )  # fmt: skip
    return _as_rows(layout, y, a_BTSI)


def _plain_gradients(
    layout: Layout,
    dy_BTSO: Tensor,
    a_BTSI: Tensor,
    weight_OabI: Tensor,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of a, the weight and the bias."""
    da, dkernel, dbias = torch.ops.aten.convolution_backward.default(
        _as_image(layout.out(), dy_BTSO), _as_image(layout, a_BTSI),
        _as_kernel(layout, weight_OabI), [weight_OabI.shape[0]],
        *_numbers(layout, weight_OabI), list(wanted),
    )  # fmt: skip
    as_kept = (1, 2, 3, 0) if layout.upsample else (0, 2, 3, 1)
    return (
        None if da is None else _as_rows(layout, da, a_BTSI),
        None if dkernel is None else dkernel.permute(as_kept),
        dbias,
    )


def _numbers(layout: Layout, weight_OabI: Tensor) -> tuple[Any, ...]:
    """Stride, padding, dilation, transposed, output padding and groups."""
    if layout.upsample:
        return [2, 2], [1, 1], [1, 1], True, [0, 0], 1
    return [1, 1], [size // 2 for size in weight_OabI.shape[1:3]], [1, 1], False, [0, 0], 1


def _as_image(layout: Layout, x_BTSC: Tensor) -> Tensor:
    """A channels-last view: frames [B*T, C, H, W], or [B, C, T, S]."""
    image = x_BTSC if layout.columns else x_BTSC.flatten(0, 1).unflatten(1, layout.size)
    return image.permute(0, 3, 1, 2)


def _as_rows(layout: Layout, y_NChw: Tensor, like_BTSC: Tensor) -> Tensor:
    """[B, T, S', C], contiguous again."""
    rows = y_NChw.permute(0, 2, 3, 1).contiguous()
    return rows if layout.columns else rows.flatten(1, 2).unflatten(0, like_BTSC.shape[:2])


def _as_kernel(layout: Layout, weight_OabI: Tensor) -> Tensor:
    """PyTorch's [O, I, a, b], of a transposed convolution [I, O, a, b]."""
    return weight_OabI.permute((3, 0, 1, 2) if layout.upsample else (0, 3, 1, 2))


def _as_video(y_BTSC: Tensor, layout: Layout) -> Tensor:
    return y_BTSC.unflatten(2, layout.size).permute(0, 1, 4, 2, 3)
