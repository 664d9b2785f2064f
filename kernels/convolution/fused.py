r"""One convolution with all that stands before and after it, and what it keeps for backward.

y = [relu of] W * a + b [+ residual] [+ projected x_l],   a = x or relu(norm(x))

The residual is of y's size, or an upsampling block's shortcut (`upsampled_shortcut.py`).

The operators `conv2d`, `conv3d`, `separable_conv3d`, `upsample_conv`, `conv_pool2d` and
`conv_pool3d` are this with different W. A norm and its ReLU in front are not kept: the backward
pass makes `a` again from x and the statistics, elementwise, so a convolution behind a norm keeps x,
which the norm needs anyway, where autograd would keep x and a. The residual is not kept at all, and
y only where it is a ReLU, whose gradient reads it; what comes next keeps it as its own x.

Shapes: B batch, T frames, S = H·W pixels, I input and O output channels; x is rows [B, T, S, I],
contiguous. W is [O, a, b, I] over two axes, rows and columns of a frame or (`Layout.columns`) time
and all pixels, or [O, t, h, w, I] over all three (`Layout.volume`). Kept: 2 bytes per value of x
in bf16, shared with whatever else keeps x. Moved besides what the convolution itself reads and
writes, bytes per value in bf16: 4 for `a`, and

| implementation | b, residual (upsampled: half a byte), x_l, ReLU and the moments of y |
|----------------|----------------------------------------------------------------------|
| triton         | 2 for the residual: all in the product's epilogue                    |
| epilogue       | 4, and 2 for the residual: one pass over cuDNN's y                   |
| pytorch        | a pass each                                                          |

Moments are the mean and variance of y per (time step, channel), for a norm that comes next;
"pytorch" and the reference leave them to that norm. Gradients are PyTorch's convolutions in every
implementation. Derivatives of order two and higher are those of the composition of differentiable
operators.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from kernels import frame_norm as norms
from kernels.convolution import pytorch as convolution_pytorch
from kernels.convolution.low_skip import LowSkip, add_low_skip, low_skip_gradients
from kernels.convolution.pytorch import Layout, as_video
from kernels.convolution.upsampled_shortcut import (
    UpsampledShortcut,
    add_upsampled,
    sums_of_four,
    upsampled_shortcut,
)
from kernels.dispatch import (
    AUTO,
    REFERENCE,
    Implementation,
    ImplementationError,
    Operator,
    everywhere,
    triton_obstacle,
    triton_reluctance,
)
from kernels.frame_norm import autograd as norm_operators
from kernels.registration import operator

_NOTHING = "nothing"

Moments = tuple[Tensor, Tensor]
"""Mean and biased variance per (time step, channel), [T, C] each, without a gradient."""


def _unmeasured(device: torch.device, dtype: torch.dtype) -> str | None:
    return triton_reluctance(device, dtype) or "it has not been measured against cuDNN"


OPERATOR = Operator(
    "convolution",
    Implementation("triton", triton_obstacle, _unmeasured),
    Implementation("epilogue", triton_obstacle, triton_reluctance),
    Implementation("pytorch", everywhere),
)


@dataclass(frozen=True)
class Normalized:
    """relu(norm(x)), not computed yet: a convolution that is given it need not keep it.

    Fields as the arguments of `kernels.frame_norm`. `moments` are x's own, by whoever made x. With
    `kept` it is computed once and kept for backward after all: more memory, the same bits.
    """

    video: Tensor
    gain: Tensor
    bias: Tensor
    statistics: tuple[Tensor, Tensor] | None = None
    group: dist.ProcessGroup | None = None
    moments: Moments | None = None
    kept: bool = False

    def value(self, impl: str | None = None) -> Tensor:
        """The video itself."""
        return norms.apply(*self.prepare(impl), self.video.shape[3:])

    def prepare(self, impl: str | None) -> tuple[norm_operators.Tensors, norm_operators.Form]:
        """The norm's tensors and form, as its operators take them."""
        return norms.prepare(
            self.video,
            self.gain,
            self.bias,
            relu=True,
            eps=norms.EPSILON,
            statistics=self.statistics,
            group=self.group,
            impl=impl,
            moments=self.moments,
        )


def source_of(x: Tensor | Normalized) -> Tensor:
    """The tensor that exists: x itself, or what is to be normalised."""
    return x.video if isinstance(x, Normalized) else x


def size_of(x: Tensor | Normalized) -> tuple[int, int]:
    """H, W."""
    height, width = source_of(x).shape[-2:]
    return height, width


def value_of(x: Tensor | Normalized) -> Tensor:
    """x as a tensor."""
    return x.value() if isinstance(x, Normalized) else x


def convolve(
    x_BTIHW: Tensor | Normalized,
    weight_OabI: Tensor,
    bias_O: Tensor | None,
    layout: Layout,
    *,
    residual_BTOHW: Tensor | UpsampledShortcut | None = None,
    skip: LowSkip | None = None,
    relu: bool = False,
    moments: bool = False,
    only_graph: bool = False,
    impl: str | None = None,
) -> tuple[Tensor, Moments | None]:
    """Returns y, [B, T', O, H', W'] in the dtype of x, channels last in memory, and its moments.

    With `relu` y is the ReLU of the sum. Moments are None unless `moments` asks for them and the
    implementation has them for little. With `only_graph` what is returned has y's gradient, but its
    values may be anything: for a pass that is made again for its backward pass, of which this is
    the last operator; not together with `relu`, whose gradient reads y.

    Raises ValueError for an x_l that does not fit, ImplementationError for an implementation that
    cannot run.
    """
    video = source_of(x_BTIHW)
    impl = OPERATOR.choose(impl, video.device, video.dtype)
    if impl == "triton" and layout.resamples:
        raise ImplementationError("convolutions that resample have no form in Triton")
    norm_tensors: Sequence[Tensor | None]
    form: norm_operators.Form | None = None
    if isinstance(x_BTIHW, Normalized):
        # Asked for by name: the norm in front is a reference where the convolution is one.
        norm_impl = REFERENCE if impl == REFERENCE else AUTO
        if x_BTIHW.kept:
            video = x_BTIHW.value(norm_impl)
        else:
            norm_tensors, form = x_BTIHW.prepare(norm_impl)
    num_frames = layout.out_frames(video.shape[1])
    shape = (len(video), num_frames, weight_OabI.shape[0], *layout.out_size)
    # With no norm before it and no x_l after it, a convolution is PyTorch's: the same is kept, and
    # a Function of our own would cost a CPU some 50 µs of Python. But where a norm is in front,
    # whether that is kept shall change no bit, and PyTorch may sum a bias's gradient otherwise.
    bare = impl == "pytorch" and skip is None and not isinstance(x_BTIHW, Normalized)
    bare = bare and not convolution_pytorch.sums_weight_over_frames(layout, video)
    if bare and not isinstance(residual_BTOHW, UpsampledShortcut):
        _check_residual(residual_BTOHW, shape)
        y_BTOHW = convolution_pytorch.convolve_video(
            layout, video, weight_OabI, bias_O, residual_BTOHW, relu
        )
        return y_BTOHW, None
    if form is None:
        norm_tensors = norms.rows(video), None, None, None, None
    residual = _residual(residual_BTOHW, shape, impl, only_graph)
    tensors = *norm_tensors, weight_OabI, bias_O, residual, *(skip or (None, None, None))
    own_moments = None
    if impl == REFERENCE or video.numel() == 0:
        y_BTSO = _compose(layout, form, tensors, relu=relu)
    elif only_graph and torch.is_grad_enabled():
        assert not relu, "its gradient reads the values"
        y_BTSO = _Convolution.apply(layout, form, _NOTHING, False, False, *tensors)
    else:
        # A Function costs some 50 µs of Python, also where nothing is to be kept.
        run = _Convolution.apply if torch.is_grad_enabled() else _forward
        if moments and impl != "pytorch":
            y_BTSO, *own_moments = run(layout, form, impl, relu, True, *tensors)
        else:
            y_BTSO = run(layout, form, impl, relu, False, *tensors)
    y_BTOHW = as_video(y_BTSO, layout.out_size)
    return y_BTOHW, None if own_moments is None else (own_moments[0], own_moments[1])


def _residual(
    residual: Tensor | UpsampledShortcut | None,
    shape: tuple[int, ...],
    impl: str,
    only_graph: bool,
) -> Tensor | None:
    """Rows of y's `shape`, or of half its height and width where they are to be upsampled."""
    if isinstance(residual, UpsampledShortcut):
        video, weight, bias = residual
        half = (*shape[:2], video.shape[2], *(size // 2 for size in shape[3:]))
        if video.shape != half or any(size % 2 for size in shape[3:]):
            raise ValueError(f"the shortcut to {shape} must be of {half}, not {tuple(video.shape)}")
        if impl == REFERENCE:
            return norms.rows(upsampled_shortcut(residual))
        layout = Layout(size_of(video))
        residual, _ = convolve(video, weight, bias, layout, only_graph=only_graph, impl=impl)
    else:
        _check_residual(residual, shape)
    return None if residual is None else norms.rows(residual)


def _check_residual(residual: Tensor | None, shape: tuple[int, ...]) -> None:
    if residual is not None and residual.shape != shape:
        raise ValueError(f"residual must be {shape}, not {tuple(residual.shape)}")


def _is_half(residual_BTSO: Tensor | None, layout: Layout) -> bool:
    height, width = layout.out_size
    return residual_BTSO is not None and residual_BTSO.shape[2] != height * width


# -------------------------------------------------------------------- operators and fakes


@operator("convolution")
def fused_convolution(
    x_BTSI: Tensor,
    weight_OabI: Tensor,
    bias_O: Tensor | None,
    residual_BTSO: Tensor | None,
    video_BtIhw: Tensor | None,
    low_weight: Tensor | None,
    low_bias: Tensor | None,
    size: Sequence[int],
    columns: bool,
    relu: bool,
    moments: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y with all its terms, mean and variance; the last two are empty if not asked for."""
    from kernels.convolution import triton as convolution_triton

    weight = weight_OabI if weight_OabI.ndim == 5 else weight_OabI.unsqueeze(3 if columns else 1)
    y_BTHWO, own = convolution_triton.convolve(
        x_BTSI.unflatten(2, size),
        weight.contiguous(),
        bias_O,
        _frames(residual_BTSO, size),
        _low(video_BtIhw, low_weight, low_bias, x_BTSI.dtype),
        moments,
        relu,
    )
    return y_BTHWO.flatten(2, 3), *(own or _no_moments(x_BTSI))


@torch.library.register_fake(fused_convolution)
def _(x_BTSI: Tensor, weight_OabI: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    num_channels = weight_OabI.shape[0]
    y_BTSO = x_BTSI.new_empty(*x_BTSI.shape[:3], num_channels)
    return y_BTSO, *_fake_moments(y_BTSO, rest[-1])


@operator("add_terms_", mutates_args=("y_BTSO",))
def add_terms_(
    y_BTSO: Tensor,
    bias_O: Tensor | None,
    residual_BTSO: Tensor | None,
    video_BtIhw: Tensor | None,
    low_weight: Tensor | None,
    low_bias: Tensor | None,
    size: Sequence[int],
    relu: bool,
    moments: bool,
) -> tuple[Tensor, Tensor]:
    """Adds all terms to y; its mean and variance, empty if not asked for.

    A residual of a quarter of y's pixels is upsampled.
    """
    from kernels.convolution import triton as convolution_triton

    _, own = convolution_triton.add_terms(
        y_BTSO.unflatten(2, size),
        bias_O,
        _frames(residual_BTSO, size),
        _low(video_BtIhw, low_weight, low_bias, y_BTSO.dtype),
        moments,
        relu,
        in_place=True,
    )
    return own or _no_moments(y_BTSO)


@torch.library.register_fake(add_terms_)
def _(y_BTSO: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _fake_moments(y_BTSO, rest[-1])


def _frames(residual_BTSO: Tensor | None, size: Sequence[int]) -> Tensor | None:
    """[B, T, H, W, O], of y's `size` or half of it."""
    if residual_BTSO is None:
        return None
    height, width = size
    if residual_BTSO.shape[2] == height * width:
        return residual_BTSO.unflatten(2, size)
    return residual_BTSO.unflatten(2, (height // 2, width // 2))


def _low(
    video: Tensor | None, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor] | None:
    """x_l channels last, and its projection as a matrix."""
    if video is None or weight is None or bias is None:
        return None
    return video.permute(0, 1, 3, 4, 2).to(dtype).contiguous(), weight.flatten(1), bias


def _no_moments(like: Tensor) -> Moments:
    return like.new_empty(0, dtype=torch.float32), like.new_empty(0, dtype=torch.float32)


def _fake_moments(y_BTSO: Tensor, moments: bool) -> Moments:
    if not moments:
        return _no_moments(y_BTSO)
    mean_TO = y_BTSO.new_empty(y_BTSO.shape[1], y_BTSO.shape[3], dtype=torch.float32)
    return mean_TO, torch.empty_like(mean_TO)


# ------------------------------------------------------------------------------- autograd


def _forward(
    layout: Layout,
    form: norm_operators.Form | None,
    impl: str,
    relu: bool,
    moments: bool,
    *tensors: Any,
) -> Any:
    """y, and its mean and variance if `moments` are wanted; without derivatives.

    The tensors: x, the norm's four, W, b, residual, and x_l's video, weight and bias, as many of
    them as there are, else None. `_NOTHING` computes nothing: values that nobody reads.
    """
    *norm_tensors, weight, bias, residual, video, low_weight, low_bias = tensors
    if impl == _NOTHING:
        x_BTSI: Tensor = norm_tensors[0]
        num_frames, (height, width) = layout.out_frames(x_BTSI.shape[1]), layout.out_size
        return x_BTSI.new_empty(len(x_BTSI), num_frames, height * width, weight.shape[0])
    a = _prologue(form, norm_tensors)
    size = layout.out_size
    terms = residual, video, low_weight, low_bias
    own: Sequence[Tensor] = ()
    if impl == "triton":
        y_BTSO, *own = fused_convolution(
            a, weight, bias, *terms, size, layout.columns, relu, moments
        )
    elif impl == "epilogue":
        y_BTSO = convolution_pytorch.convolution(layout, a, weight, None)
        if relu or moments or bias is not None or residual is not None or video is not None:
            y = convolution_pytorch.changeable(y_BTSO)
            own = add_terms_(y, bias, *terms, size, relu, moments)
    else:
        y_BTSO = convolution_pytorch.convolution(layout, a, weight, bias)
        skip = None if video is None else LowSkip(video, low_weight, low_bias)
        convolution_pytorch.add_terms_(y_BTSO, residual, skip, size, relu)
    return (y_BTSO, *own) if moments else y_BTSO


class _Convolution(torch.autograd.Function):
    """`_forward` and its gradient, of PyTorch's convolution and our operators, which counters and
    compilers see."""

    @staticmethod
    def forward(
        ctx: Any,
        layout: Layout,
        form: norm_operators.Form | None,
        impl: str,
        relu: bool,
        moments: bool,
        *tensors: Any,
    ) -> Any:
        *norm_tensors, weight, bias, residual, video, low_weight, low_bias = tensors
        ctx.layout, ctx.form = layout, form
        # Biases may be parameters, which ZeRO-3 empties before the backward pass: kept by size.
        ctx.bias_sizes = [None if v is None else v.shape for v in (bias, low_bias)]
        ctx.halves_residual = _is_half(residual, layout)
        results = _forward(layout, form, impl, relu, moments, *tensors)
        ctx.set_materialize_grads(False)  # else zeros are made for the moments, which have none
        y = (results[0] if moments else results) if relu else None
        ctx.save_for_backward(*norm_tensors, weight, video, low_weight, y)
        if moments:
            ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        dy, layout, form, wants = grads[0], ctx.layout, ctx.form, ctx.needs_input_grad[5:]
        none = None, None, None, None, None
        if dy is None:
            return *none, *[None] * 11
        *norm_tensors, weight, video, low_weight, y = ctx.saved_tensors
        if y is not None:
            # What is left to differentiate is linear in dy: the mask itself has no derivative.
            dy = torch.ops.aten.threshold_backward(dy, y.detach(), 0)
        dresidual = None
        if wants[7]:
            dresidual = sums_of_four(dy, layout.out_size) if ctx.halves_residual else dy
        if not any(wants[:7]) and not any(wants[8:]):  # the residual alone
            return *none, *(dresidual if i == 7 else None for i in range(11))
        if torch.is_grad_enabled():  # a graph of the backward pass is wanted
            biases = [None if size is None else dy.new_zeros(size) for size in ctx.bias_sizes]
            tensors = *norm_tensors, weight, biases[0], None, video, low_weight, biases[1]
            found = _differentiable_gradients(layout, form, tensors, dy, wants)
            found[7] = dresidual
            return *none, *found
        dy = dy.contiguous()
        found = [None] * 11
        wanted = any(wants[:5]), wants[5], wants[6]
        a = _prologue(form, norm_tensors)
        da, found[5], found[6] = convolution_pytorch.gradients(layout, dy, a, weight, wanted)
        del a
        if form is None:
            found[0] = da
        elif da is not None:
            found[:5] = norm_operators.gradients(da, norm_tensors, form, wants[:5])
        found[7] = dresidual
        if any(wants[8:]):
            dy_BTOHW = as_video(dy, layout.out_size)
            found[8:] = low_skip_gradients(dy_BTOHW, video, low_weight, wants[8:])
        return *none, *found


def _prologue(form: norm_operators.Form | None, norm_tensors: Sequence[Any]) -> Tensor:
    if form is None:
        x_BTSI: Tensor = norm_tensors[0]
        return x_BTSI
    return norm_operators.untracked_normalize(norm_tensors, form)


def _differentiable_gradients(
    layout: Layout,
    form: norm_operators.Form | None,
    tensors: Sequence[Any],
    dy_BTSO: Tensor,
    wants: Sequence[bool],
) -> list[Tensor | None]:
    """Those of `_compose`, which have derivatives, but for the residual's."""
    wanted = [i for i, wants_it in enumerate(wants) if wants_it and i != 7]
    leaves = [tensors[i].requires_grad_() for i in wanted]
    if form is not None:
        tensors = *norm_operators.with_own_statistics(tensors[:5], form), *tensors[5:]
    grads = torch.autograd.grad(
        _compose(layout, form, tensors), leaves, dy_BTSO, create_graph=True, allow_unused=True
    )
    found = dict(zip(wanted, grads, strict=True))
    return [found.get(i) for i in range(11)]


def _compose(
    layout: Layout,
    form: norm_operators.Form | None,
    tensors: Sequence[Any],
    *,
    relu: bool = False,
) -> Tensor:
    """The equation in differentiable operators, of what `_Convolution` takes."""
    *norm_tensors, weight, bias, residual, video, low_weight, low_bias = tensors
    a = norm_tensors[0] if form is None else norm_operators.differentiable(norm_tensors, form)
    y_BTSO = convolution_pytorch.convolution(layout, a, weight, bias)
    if _is_half(residual, layout):
        y_BTSO = add_upsampled(y_BTSO, residual, layout.out_size)
    elif residual is not None:
        y_BTSO = y_BTSO + residual
    if video is not None:
        y_BTOHW = as_video(y_BTSO, layout.out_size)
        y_BTSO = norms.rows(add_low_skip(y_BTOHW, LowSkip(video, low_weight, low_bias)))
    return F.relu(y_BTSO) if relu else y_BTSO
