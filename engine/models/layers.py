"""The layers of G and D: all their weights are spectrally normalised, orthogonal at first.

A layer computes in the dtype of its input, into which it casts the normalised weight.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from engine.models.biases import BiasedLayer
from engine.models.features import Features, NormalizedFeatures
from engine.models.operators import OperatorLayer
from engine.models.spectral import SpectralWeight

LOW_CHANNELS = 3  # x_l is RGB


class Linear(BiasedLayer):
    """y = Ŵ x + b: [..., in] → [..., out]."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = True, kept_dtype: bool = False
    ) -> None:
        super().__init__(out_features if bias else 0, kept_dtype=kept_dtype)
        self.normalized = SpectralWeight(out_features, in_features, kept_dtype=kept_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Computed in the dtype of x."""
        bias = None if self.bias is None else self.bias_in(x.dtype)
        return F.linear(x, self.normalized(x.dtype), bias)


class Embedding(nn.Module):
    """Rows of a normalised table: labels [B] → [B, size], fp32."""

    def __init__(self, num_classes: int, size: int) -> None:
        super().__init__()
        self.normalized = SpectralWeight(num_classes, size, kept_dtype=True)

    def forward(self, labels_B: Tensor) -> Tensor:
        """Look the labels up."""
        return F.embedding(labels_B, self.normalized())


Resampling = Literal["up"] | kernels.Pooling | None
"""Upsampling by two to nearest neighbours before a convolution, average pooling over frames, rows
and columns after it, or neither."""


class BlockEnd(OperatorLayer, BiasedLayer):
    """A convolution that may be the last layer of a block."""

    recomputing = False
    """Whether its block is computed again for its backward pass, where nobody reads the result."""

    @property
    def only_graph(self) -> bool:
        """The operators' argument of that name: in a block that is computed again nobody reads this
        layer's result, so it is left out."""
        # A compiled block's two passes must be one program, which keeps the same tensors: it must
        # not even ask whether this is the second.
        return not torch.compiler.is_compiling() and self.recomputing


class Convolution(BlockEnd):
    """A convolution of every frame (3x3 or 1x1) or of a volume (3x3x3), perhaps resampling.

    Shape of the weight: [out, *kernel_size, in].
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int] = (3, 3),
        *,
        resample: Resampling = None,
    ) -> None:
        super().__init__(out_channels)
        self.volumetric, self.resample = len(kernel_size) == 3, resample
        self.normalized = SpectralWeight(
            out_channels, *kernel_size, in_channels, fold=_fold(resample, kernel_size)
        )

    def operands(self, dtype: torch.dtype) -> tuple[Any, Tensor]:
        """(weight, bias) as the operator takes them, in `dtype`.

        An operator that resamples folds the weight before it rounds, so it takes both as they are
        kept. If the pass has prepared the weight, it is `kernels.Folded` already.
        """
        asked = dtype if self.resample is None else None
        return self.normalized(asked), self.bias_in(asked)

    def forward(
        self,
        x: Tensor | NormalizedFeatures,
        *,
        residual: Tensor | kernels.UpsampledShortcut | None = None,
        skip: kernels.LowSkip | None = None,
        relu: bool = False,
    ) -> Tensor | Features:
        """Behind a norm, in G, this returns `Features`; given a video, in D, it returns a video.

        `residual` and, in G, `skip` (x_l) are added to the result; with `relu`, in D, it is the
        ReLU of the sum.
        """
        asked: dict[str, Any] = {
            "residual_BTOHW": residual,
            "skip": skip,
            "relu": relu or None,
            "only_graph": self.only_graph or None,
        }
        # Each operator takes only some of these terms: it is given those that there are.
        terms = {name: term for name, term in asked.items() if term is not None}
        weight, bias = self.operands(x.dtype)
        if isinstance(x, NormalizedFeatures):
            y: kernels.Measured = self.operator(x.normalized, weight, bias, **terms)
            return Features(y.video, y.moments, x.frames_BT)
        y_BTCHW: Tensor = self.operator(x, weight, bias, **terms)
        return y_BTCHW

    @property
    def operator(self) -> Callable[..., Any]:
        """The one that convolves and resamples so."""
        if self.resample == "up":
            return self.operators.upsample_conv
        if self.resample is None:
            return self.operators.conv3d if self.volumetric else self.operators.conv2d
        if self.volumetric:
            return partial(self.operators.conv_pool3d, pooling=self.resample)
        return self.operators.conv_pool2d


def _fold(resample: Resampling, kernel_size: Sequence[int]) -> kernels.Fold:
    """What the operator folds into the weight."""
    if resample is None:
        return None
    return "upsampling" if resample == "up" else resample[-len(kernel_size) :]


class SeparableConvolution(BlockEnd):
    """A temporal (3) and a spatial (3x3) convolution with one bias after both.

    Decided: the pair stands for one convolution of the block, so it has one bias.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(out_channels)
        self.temporal = SpectralWeight(out_channels, 3, in_channels)
        self.spatial = SpectralWeight(out_channels, 3, 3, out_channels)

    def operands(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """(temporal weight [O, 3, I], spatial weight [O, 3, 3, O], bias), in `dtype`."""
        return self.temporal(dtype), self.spatial(dtype), self.bias_in(dtype)

    def forward(
        self,
        x: NormalizedFeatures,
        *,
        residual: Tensor | None = None,
        skip: kernels.LowSkip | None = None,
    ) -> Features:
        """As `Convolution` behind a norm."""
        y = self.operators.separable_conv3d(
            x.normalized,
            *self.operands(x.dtype),
            residual_BTOHW=residual,
            skip=skip,
            only_graph=self.only_graph,
        )
        return Features(y.video, y.moments, x.frames_BT)


class Shortcut(OperatorLayer, BiasedLayer):
    """A block's 1x1 convolution from its input to its output, resampled as the block is.

    It commutes with upsampling and pooling, so it works on the fewer pixels.
    """

    def __init__(self, in_channels: int, out_channels: int, *, resample: Resampling = None) -> None:
        super().__init__(out_channels)
        self.resample = resample
        self.normalized = SpectralWeight(out_channels, 1, 1, in_channels)

    def forward(self, x_BTCHW: Tensor) -> Tensor | kernels.UpsampledShortcut:
        """What the block's last convolution adds: a video, or one that it upsamples itself."""
        weight, bias = self.normalized(x_BTCHW.dtype), self.bias_in(x_BTCHW.dtype)
        if self.resample == "up":
            return kernels.UpsampledShortcut(x_BTCHW, weight, bias)
        if self.resample is not None:
            x_BTCHW = self.operators.average_pool(x_BTCHW, self.resample)
        y_BTCHW: Tensor = self.operators.conv2d(x_BTCHW, weight, bias)
        return y_BTCHW


class Injection(nn.Module):
    """The 1x1 convolution that adds x_l to a block's output (SSW-GAN, upsampling stages)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.projection = Convolution(LOW_CHANNELS, channels, (1, 1))

    def forward(self, low: Tensor | None, like: Tensor) -> kernels.LowSkip | None:
        """What the block's last operator adds, in the dtype of `like`."""
        if low is None:
            raise ValueError("this block injects a low-resolution video, but was given none")
        return kernels.LowSkip(low, *self.projection.operands(like.dtype))


class NoInjection(nn.Module):
    """In the place of `Injection` where a block has none."""

    def forward(self, low: Tensor | None, like: Tensor) -> None:
        """Nothing to add."""


class ConvGRU(OperatorLayer):
    """Convolutional GRU whose hidden state has the input's channels (3x3, ReLU candidate)."""

    hidden_BCHW: Tensor | None = None
    """h before the first frame, where a video goes on (engine/models/chunks.py); None is 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reset = Convolution(2 * channels, channels)
        self.update = Convolution(2 * channels, channels)
        self.candidate = Convolution(2 * channels, channels)

    def forward(self, x_BTCHW: Tensor) -> Tensor:
        """Every hidden state, [B, T, C, H, W]."""
        gates = [gate.operands(x_BTCHW.dtype) for gate in (self.reset, self.update, self.candidate)]
        weights, biases = zip(*gates, strict=True)
        goes_on = {} if self.hidden_BCHW is None else {"hidden_BCHW": self.hidden_BCHW}
        h_BTCHW: Tensor = self.operators.conv_gru(x_BTCHW, *weights, *biases, **goes_on)
        return h_BTCHW
