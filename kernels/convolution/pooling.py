"""A convolution, then average pooling by two: how a discriminator's block ends.

y = pool(W * x + b) [+ residual]. In 2D the pooling is 2x2. In 3D it is (1, 2, 2), which keeps
time, or (2, 2, 2); a last frame, row or column without a partner is dropped.

Shapes: B batch, T frames, I input and O output channels, H x W pixels, outputs H/2 x W/2 (and
T/2). Weights [O, 3, 3, I] and [O, 3, 3, 3, I], kept in fp32: they are folded as they come, then
cast to the dtype of x. One of an even number of rows is folded already, for the same pooling
(`kernels.convolution.folding.pooling_kernel`), and runs as the convolution with stride that it is.

Pooling is a convolution with stride, so both are one convolution whose kernel has a tap more along
every pooled axis. FLOPs per input element, in units of I·O:

| form      | 2D | (1, 2, 2) | (2, 2, 2) | besides y                             |
|-----------|----|-----------|-----------|---------------------------------------|
| reference | 18 | 54        | 54        | W * x + b, once written and once read |
| folded    | 8  | 24        | 16        | nothing                               |

Both are the same function, with derivatives of any order. The folded form is one of
`kernels.convolution.fused`'s, which adds bias and residual in one pass where it runs on CUDA.
"""

from torch import Tensor
from torch.nn import functional as F

from kernels.common.layout import fold_frames, unfold_frames
from kernels.convolution import conv2d, conv3d
from kernels.convolution.folding import pooling_kernel
from kernels.convolution.fused import convolve, size_of
from kernels.convolution.pytorch import Layout
from kernels.dispatch import REFERENCE, Implementation, Operator, everywhere

Pooling = tuple[int, int, int]

_OPERATOR2D = Operator("conv_pool2d", Implementation("folded", everywhere))
_OPERATOR3D = Operator("conv_pool3d", Implementation("folded", everywhere))


def average_pool(x_BTCHW: Tensor, pooling: Pooling = (1, 2, 2)) -> Tensor:
    """Mean over boxes of (frames, rows, columns); returns [B, T // pooling[0], C, H // 2, W // 2].

    A last frame, row or column without a partner is dropped. Raises ValueError for a video smaller
    than a box, and for another pooling than (1, 2, 2) and (2, 2, 2).
    """
    _check(x_BTCHW, pooling)
    if pooling == (2, 2, 2):
        # Not avg_pool3d, which knows no bf16 on a CPU.
        pairs = x_BTCHW[:, : x_BTCHW.shape[1] // 2 * 2].unflatten(1, (-1, 2))
        x_BTCHW = pairs.mean(dim=2)
    return unfold_frames(F.avg_pool2d(fold_frames(x_BTCHW), 2), x_BTCHW.shape[1])


def conv_pool2d_reference(
    x_BTIHW: Tensor, weight_OhwI: Tensor, bias_O: Tensor | None = None
) -> Tensor:
    """As the equation stands, frame by frame."""
    parameters = _cast(x_BTIHW, weight_OhwI, bias_O)
    return average_pool(conv2d(x_BTIHW, *parameters, impl=REFERENCE))


def conv_pool2d_folded(
    x_BTIHW: Tensor,
    weight_OhwI: Tensor,
    bias_O: Tensor | None = None,
    *,
    residual_BTOHW: Tensor | None = None,
    only_graph: bool = False,
    impl: str | None = None,
) -> Tensor:
    """The same as one convolution of stride 2, 4x4 for a 3x3 weight, plus the residual.

    `impl` is one of the convolution's.
    """
    _check(x_BTIHW, (1, 2, 2))
    folded = weight_OhwI if is_folded(weight_OhwI) else pooling_kernel(weight_OhwI, (2, 2))
    parameters = _cast(x_BTIHW, folded, bias_O)
    layout = Layout(size_of(x_BTIHW), pooling=(1, 2, 2))
    y_BTOHW, _ = convolve(
        x_BTIHW,
        *parameters,
        layout,
        residual_BTOHW=residual_BTOHW,
        only_graph=only_graph,
        impl=impl,
    )
    return y_BTOHW


def conv_pool2d(
    x_BTIHW: Tensor,
    weight_OhwI: Tensor,
    bias_O: Tensor | None = None,
    *,
    residual_BTOHW: Tensor | None = None,
    only_graph: bool = False,
    impl: str | None = None,
) -> Tensor:
    """Convolve every frame by itself, pool, add the (already pooled) residual.

    Returns [B, T, O, H // 2, W // 2] in the dtype of x. `only_graph` as
    `kernels.convolution.fused.convolve`'s; `impl` is "folded" or "reference".
    """
    refers = _OPERATOR2D.choose(impl, x_BTIHW.device, x_BTIHW.dtype) == REFERENCE
    if refers and not is_folded(weight_OhwI):
        return _add(conv_pool2d_reference(x_BTIHW, weight_OhwI, bias_O), residual_BTOHW)
    form = REFERENCE if refers else None
    return conv_pool2d_folded(
        x_BTIHW,
        weight_OhwI,
        bias_O,
        residual_BTOHW=residual_BTOHW,
        only_graph=only_graph,
        impl=form,
    )


def conv_pool3d_reference(
    x_BTIHW: Tensor,
    weight_OthwI: Tensor,
    bias_O: Tensor | None = None,
    pooling: Pooling = (1, 2, 2),
) -> Tensor:
    """As the equation stands."""
    parameters = _cast(x_BTIHW, weight_OthwI, bias_O)
    return average_pool(conv3d(x_BTIHW, *parameters, impl=REFERENCE), pooling)


def conv_pool3d_folded(
    x_BTIHW: Tensor,
    weight_OthwI: Tensor,
    bias_O: Tensor | None = None,
    pooling: Pooling = (1, 2, 2),
    *,
    residual_BTOHW: Tensor | None = None,
    only_graph: bool = False,
    impl: str | None = None,
) -> Tensor:
    """The same as one convolution of stride `pooling`, 3x4x4 or 4x4x4 for a 3x3x3 weight, plus the
    residual. `impl` is one of the convolution's."""
    _check(x_BTIHW, pooling)
    if is_folded(weight_OthwI) and (weight_OthwI.shape[1] % 2 == 0) != (pooling[0] == 2):
        sizes = tuple(weight_OthwI.shape[1:4])
        raise ValueError(f"a kernel of {sizes} is not one that {pooling} is folded into")
    folded = weight_OthwI if is_folded(weight_OthwI) else pooling_kernel(weight_OthwI, pooling)
    parameters = _cast(x_BTIHW, folded, bias_O)
    layout = Layout(size_of(x_BTIHW), volume=True, pooling=pooling)
    y_BTOHW, _ = convolve(
        x_BTIHW,
        *parameters,
        layout,
        residual_BTOHW=residual_BTOHW,
        only_graph=only_graph,
        impl=impl,
    )
    return y_BTOHW


def conv_pool3d(
    x_BTIHW: Tensor,
    weight_OthwI: Tensor,
    bias_O: Tensor | None = None,
    *,
    residual_BTOHW: Tensor | None = None,
    pooling: Pooling = (1, 2, 2),
    only_graph: bool = False,
    impl: str | None = None,
) -> Tensor:
    """Convolve in time and space, pool, add the (already pooled) residual.

    Returns [B, T // pooling[0], O, H // 2, W // 2] in the dtype of x. The rest as in `conv_pool2d`.
    Raises ValueError as `average_pool` does.
    """
    refers = _OPERATOR3D.choose(impl, x_BTIHW.device, x_BTIHW.dtype) == REFERENCE
    if refers and not is_folded(weight_OthwI):
        return _add(conv_pool3d_reference(x_BTIHW, weight_OthwI, bias_O, pooling), residual_BTOHW)
    form = REFERENCE if refers else None
    return conv_pool3d_folded(
        x_BTIHW,
        weight_OthwI,
        bias_O,
        pooling,
        residual_BTOHW=residual_BTOHW,
        only_graph=only_graph,
        impl=form,
    )


def is_folded(weight: Tensor) -> bool:
    """Whether pooling is in the weight already: a tap more than an odd number of rows."""
    return weight.shape[-3] % 2 == 0


def _check(x_BTCHW: Tensor, pooling: Pooling) -> None:
    if pooling not in ((1, 2, 2), (2, 2, 2)):
        raise ValueError(f"pooling must be (1, 2, 2) or (2, 2, 2), not {pooling}")
    size = (x_BTCHW.shape[1], *x_BTCHW.shape[3:])
    if any(length < box for length, box in zip(size, pooling, strict=True)):
        raise ValueError(f"a video of {size} (frames, rows, columns) is smaller than {pooling}")


def _add(y_BTOHW: Tensor, residual_BTOHW: Tensor | None) -> Tensor:
    return y_BTOHW if residual_BTOHW is None else y_BTOHW + residual_BTOHW


def _cast(x_BTIHW: Tensor, weight: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
    dtype = x_BTIHW.dtype
    return weight.to(dtype), None if bias_O is None else bias_O.to(dtype)
