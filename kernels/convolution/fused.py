r"""One convolution with all that stands before and after it, and what it keeps for backward.

y = [relu of] W * a + b [+ residual] [+ projected x_l],   a = x or relu(norm(x))

Every operator of `kernels.convolution` is this with different W. The result `a` of a norm in front
is not kept: the backward pass computes it again from x and the statistics, elementwise, so a
convolution behind a norm keeps x alone, which the norm needs anyway. The residual is not kept at
all. y is kept only where it is a ReLU, whose gradient reads it; what comes next keeps it as its x.

Shapes: B batch, T frames, S = H·W pixels, I input and O output channels; x is rows [B, T, S, I],
contiguous. W is [O, a, b, I] over two axes, rows and columns of a frame or (`Layout.columns`) time
and all pixels, or [O, t, h, w, I] over all three (`Layout.volume`). Kept: 2 bytes per value of x
in bf16, shared with whatever else keeps x. Moved besides what the convolution itself reads and
writes, bytes per value in bf16: 4 for `a`, and

| implementation | b, residual (a quarter of it if upsampled), x_l, ReLU, moments of y   |
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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import frame_norm as norms
from kernels.convolution import pytorch as convolution_pytorch
from kernels.convolution.normalized import Moments, Normalized, size_of, source_of
from kernels.convolution.operators import add_terms_, fused_convolution
from kernels.convolution.pytorch import Layout, as_video
from kernels.convolution.terms import (
    LowSkip,
    UpsampledShortcut,
    add_low_skip,
    add_upsampled,
    low_skip_gradients,
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
    triton_not_preferred,
    triton_unsupported,
)
from kernels.frame_norm import autograd as norm_autograd
from kernels.frame_norm import pytorch as norm_pytorch
from kernels.frame_norm.operands import NormMethod, NormOperands


def _unmeasured(device: torch.device, dtype: torch.dtype) -> str | None:
    return triton_not_preferred(device, dtype) or "it has not been measured against cuDNN"


OPERATOR = Operator(
    "convolution",
    Implementation("triton", triton_unsupported, _unmeasured),
    Implementation("epilogue", triton_unsupported, triton_not_preferred),
    Implementation("pytorch", everywhere),
)
_GRAPH_ONLY = "graph only"
"""In the place of an implementation: y is not computed, only its graph is built."""


class ConvolutionMethod(NamedTuple):
    """How a convolution is computed."""

    layout: Layout
    norm: NormMethod | None
    """Of the norm in front; None: there is none."""
    implementation: str
    relu: bool
    moments: bool
    """Whether y's are computed too."""


class ConvolutionOperands(NamedTuple):
    """The tensors that a convolution computes with, and has gradients of."""

    x: Tensor
    gain: Tensor | None
    """This and the next three are the norm's."""
    shift: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None
    """Rows of y, or of half its height and width, which are upsampled."""
    low_video: Tensor | None
    """This and the next two are x_l's, as in `LowSkip`."""
    low_weight: Tensor | None
    low_bias: Tensor | None

    @property
    def norm(self) -> NormOperands:
        """What the norm in front takes, where there is one."""
        tensors: tuple[Any, ...] = self[:5]
        return NormOperands(*tensors)

    @property
    def terms(self) -> tuple[Tensor | None, ...]:
        """What is added besides the bias."""
        return self[7:]

    @property
    def skip(self) -> LowSkip | None:
        """x_l and its projection."""
        if self.low_video is None:
            return None
        assert self.low_weight is not None
        assert self.low_bias is not None
        return LowSkip(self.low_video, self.low_weight, self.low_bias)


def convolve(
    x_BTIHW: Tensor | Normalized,
    weight_OabI: Tensor,
    bias_O: Tensor | None,
    layout: Layout,
    *,
    residual: Tensor | UpsampledShortcut | None = None,
    skip: LowSkip | None = None,
    relu: bool = False,
    moments: bool | None = None,
    only_graph: bool = False,
    implementation: str | None = None,
) -> tuple[Tensor, Moments | None]:
    """Returns y, [B, T', O, H', W'] in the dtype of x, channels last in memory, and its moments.

    With `relu` y is the ReLU of the sum. Moments are None unless they are asked for, by `moments`
    or else by `Normalized`, and the implementation has them for little. With
    `only_graph` y has its gradient, but its values may be anything, because `_Convolution` does not
    compute them: for the last operator of a pass that is made again for its backward pass. Not
    together with `relu`, whose gradient reads y.

    Raises ValueError for an x_l that does not fit, ImplementationError for an implementation that
    cannot run.
    """
    video = source_of(x_BTIHW)
    implementation = OPERATOR.choose(implementation, video.device, video.dtype)
    if implementation == "triton" and layout.resamples:
        raise ImplementationError("convolutions that resample have no implementation in Triton")
    norm_method: NormMethod | None = None
    x_operands: tuple[Any, ...] | None = None
    if isinstance(x_BTIHW, Normalized):
        moments = x_BTIHW.wants_moments if moments is None else moments
        # If the reference convolution was asked for, its norm is the reference too.
        norm_impl = REFERENCE if implementation == REFERENCE else AUTO
        if x_BTIHW.kept:
            video = x_BTIHW.value(norm_impl)
        else:
            x_operands, norm_method = x_BTIHW.prepare(norm_impl)
    num_frames = layout.out_frames(video.shape[1])
    shape = (len(video), num_frames, weight_OabI.shape[0], *layout.out_size)
    if not isinstance(residual, UpsampledShortcut):
        _check_residual(residual, shape)
        if implementation == "pytorch" and skip is None and _is_pytorchs_own(x_BTIHW, layout):
            y_BTOHW = convolution_pytorch.convolve_video(
                layout, video, weight_OabI, bias_O, residual, relu
            )
            return y_BTOHW, None
    tensors: tuple[Any, ...] = (
        *(x_operands or (norms.rows(video), None, None, None, None)),
        weight_OabI,
        bias_O,
        _residual_rows(residual, shape, implementation, only_graph),
        *(skip or (None, None, None)),
    )
    method = ConvolutionMethod(layout, norm_method, implementation, relu, bool(moments))
    y_BTSO, own_moments = _compute(method, ConvolutionOperands(*tensors), only_graph)
    return as_video(y_BTSO, layout.out_size), own_moments


def _is_pytorchs_own(x: Tensor | Normalized, layout: Layout) -> bool:
    """Whether PyTorch's own convolution suffices, which saves a CPU the 50 µs of our Function.

    Not behind a norm: whether the norm's result is kept shall change no bit, but PyTorch may sum a
    bias's gradient in another order.
    """
    if isinstance(x, Normalized):
        return False
    return not convolution_pytorch.sums_weight_over_frames(layout, x)


def _compute(
    method: ConvolutionMethod, operands: ConvolutionOperands, only_graph: bool
) -> tuple[Tensor, Moments | None]:
    """y, and its moments where they are asked for and cost little."""
    if method.implementation == REFERENCE or operands.x.numel() == 0:
        return _compose(method, operands), None
    if only_graph and torch.is_grad_enabled():
        assert not method.relu, "its gradient reads the values"
        method = method._replace(implementation=_GRAPH_ONLY, moments=False)
        return _Convolution.apply(method, *operands), None
    if method.implementation == "pytorch":
        method = method._replace(moments=False)
    # A Function costs some 50 µs of Python, also where nothing is to be kept.
    run = _Convolution.apply if torch.is_grad_enabled() else _forward
    results = run(method, *operands)
    if not method.moments:
        return results, None
    y_BTSO, mean_TO, var_TO = results
    return y_BTSO, (mean_TO, var_TO)


def _residual_rows(
    residual: Tensor | UpsampledShortcut | None,
    shape: tuple[int, ...],
    implementation: str,
    only_graph: bool,
) -> Tensor | None:
    """Rows of y's `shape`, or of half its height and width where they are to be upsampled."""
    if isinstance(residual, UpsampledShortcut):
        video, weight, bias = residual
        half = (*shape[:2], video.shape[2], *(size // 2 for size in shape[3:]))
        if video.shape != half or any(size % 2 for size in shape[3:]):
            raise ValueError(f"the shortcut to {shape} must be of {half}, not {tuple(video.shape)}")
        if implementation == REFERENCE:
            return norms.rows(upsampled_shortcut(residual))
        layout = Layout(size_of(video))
        residual, _ = convolve(
            video, weight, bias, layout, only_graph=only_graph, implementation=implementation
        )
    return None if residual is None else norms.rows(residual)


def _check_residual(residual: Tensor | None, shape: tuple[int, ...]) -> None:
    if residual is not None and residual.shape != shape:
        raise ValueError(f"residual must be {shape}, not {tuple(residual.shape)}")


def _is_half(residual_BTSO: Tensor | None, layout: Layout) -> bool:
    height, width = layout.out_size
    return residual_BTSO is not None and residual_BTSO.shape[2] != height * width


def _forward(method: ConvolutionMethod, *tensors: Any) -> Any:
    """y, and its mean and variance if the method says so, of operands; without derivatives."""
    layout, _, implementation, relu, moments = method
    operands = ConvolutionOperands(*tensors)
    if implementation == _GRAPH_ONLY:
        num_frames, (height, width) = layout.out_frames(operands.x.shape[1]), layout.out_size
        num_channels = operands.weight.shape[0]
        return operands.x.new_empty(len(operands.x), num_frames, height * width, num_channels)
    a, weight, bias = _prologue(method, operands), operands.weight, operands.bias
    size = layout.out_size
    own: Sequence[Tensor] = ()
    if implementation == "triton":
        y_BTSO, *own = fused_convolution(
            a, weight, bias, *operands.terms, size, layout.columns, relu, moments
        )
    elif implementation == "epilogue":
        y_BTSO = convolution_pytorch.convolution(layout, a, weight, None)
        if relu or moments or any(term is not None for term in (bias, *operands.terms)):
            y = convolution_pytorch.changeable(y_BTSO)
            own = add_terms_(y, bias, *operands.terms, size, relu, moments)
    else:
        y_BTSO = convolution_pytorch.convolution(layout, a, weight, bias)
        convolution_pytorch.add_terms_(y_BTSO, operands.residual, operands.skip, size, relu)
    return (y_BTSO, *own) if moments else y_BTSO


class _Convolution(torch.autograd.Function):
    """`_forward` and its gradient, of PyTorch's convolution and our operators, which counters and
    compilers see."""

    @staticmethod
    def forward(ctx: Any, method: ConvolutionMethod, *tensors: Any) -> Any:
        operands = ConvolutionOperands(*tensors)
        ctx.method = method
        # Biases may be parameters, which ZeRO-3 empties before the backward pass: kept by size.
        ctx.bias_sizes = [None if v is None else v.shape for v in (operands.bias, tensors[-1])]
        ctx.halves_residual = _is_half(operands.residual, method.layout)
        results = _forward(method, *tensors)
        ctx.set_materialize_grads(False)  # else zeros are made for the moments, which have none
        y = (results[0] if method.moments else results) if method.relu else None
        kept = operands.weight, operands.low_video, operands.low_weight
        ctx.save_for_backward(*tensors[:5], *kept, y)
        if method.moments:
            ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        dy, method = grads[0], ctx.method
        fields = ConvolutionOperands._fields
        if dy is None:
            return None, *[None for _ in fields]
        wants = dict(zip(fields, ctx.needs_input_grad[1:], strict=True))
        *x_operands, weight, low_video, low_weight, y = ctx.saved_tensors
        if y is not None:
            # What is left to differentiate is linear in dy: the mask itself has no derivative.
            dy = torch.ops.aten.threshold_backward(dy, y.detach(), 0)
        found: dict[str, Tensor | None] = {}
        if wants.pop("residual"):
            size = method.layout.out_size
            found["residual"] = sums_of_four(dy, size) if ctx.halves_residual else dy
        if any(wants.values()):
            with_graph = torch.is_grad_enabled()  # a graph of the backward pass is wanted
            bias, low_bias = (
                None if size is None or not with_graph else dy.new_zeros(size)
                for size in ctx.bias_sizes
            )
            tensors = *x_operands, weight, bias, None, low_video, low_weight, low_bias
            operands = ConvolutionOperands(*tensors)
            differentiate = _differentiable_gradients if with_graph else _gradients
            found |= differentiate(method, operands, dy, wants)
        return None, *[found.get(name) for name in fields]


def _gradients(
    method: ConvolutionMethod, operands: ConvolutionOperands, dy: Tensor, wants: dict[str, bool]
) -> dict[str, Tensor | None]:
    """Those of `_forward`, in closed form, by name; biases and the residual are not needed."""
    layout, norm = method.layout, method.norm
    of_x = [wants[name] for name in ConvolutionOperands._fields[:5]]
    of_low = [wants[name] for name in ConvolutionOperands._fields[8:]]
    dy = dy.contiguous()
    found: dict[str, Tensor | None] = {}
    a = _prologue(method, operands)
    da, found["weight"], found["bias"] = convolution_pytorch.gradients(
        layout, dy, a, operands.weight, (any(of_x), wants["weight"], wants["bias"])
    )
    del a
    if norm is None:
        found["x"] = da
    elif da is not None:
        of_norm = norm_autograd.gradients(da, operands.norm, norm, of_x)
        found |= zip(ConvolutionOperands._fields[:5], of_norm, strict=True)
    if any(of_low):
        assert operands.low_video is not None
        assert operands.low_weight is not None
        dy_BTOHW = as_video(dy, layout.out_size)
        of_skip = low_skip_gradients(dy_BTOHW, operands.low_video, operands.low_weight, of_low)
        found |= zip(ConvolutionOperands._fields[8:], of_skip, strict=True)
    return found


def _differentiable_gradients(
    method: ConvolutionMethod, operands: ConvolutionOperands, dy: Tensor, wants: dict[str, bool]
) -> dict[str, Tensor | None]:
    """Those of `_compose`, which have derivatives, by name; biases are zeros of their size."""
    named = operands._asdict()
    wanted = [name for name, wants_it in wants.items() if wants_it]
    leaves = [named[name].requires_grad_() for name in wanted]
    if method.norm is not None:
        with_statistics = norm_autograd.with_own_statistics(operands.norm, method.norm)
        rest: tuple[Any, ...] = operands[5:]
        operands = ConvolutionOperands(*with_statistics, *rest)
    y_BTSO = _compose(method._replace(relu=False), operands)
    grads = torch.autograd.grad(y_BTSO, leaves, dy, create_graph=True, allow_unused=True)
    return dict(zip(wanted, grads, strict=True))


def _prologue(method: ConvolutionMethod, operands: ConvolutionOperands) -> Tensor:
    """What the convolution reads: x, or its norm and ReLU."""
    if method.norm is None:
        return operands.x
    return norm_autograd.untracked_normalize(operands.norm, method.norm)


def _compose(method: ConvolutionMethod, operands: ConvolutionOperands) -> Tensor:
    """The equation in differentiable operators."""
    layout, residual = method.layout, operands.residual
    a = operands.x if method.norm is None else norm_pytorch.normalize(operands.norm)
    y_BTSO = convolution_pytorch.convolution(layout, a, operands.weight, operands.bias)
    if residual is not None and _is_half(residual, layout):
        y_BTSO = add_upsampled(y_BTSO, residual, layout.out_size)
    elif residual is not None:
        y_BTSO = y_BTSO + residual
    if operands.skip is not None:
        y_BTSO = norms.rows(add_low_skip(as_video(y_BTSO, layout.out_size), operands.skip))
    return F.relu(y_BTSO) if method.relu else y_BTSO
