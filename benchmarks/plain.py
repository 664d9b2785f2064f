"""The operators as one writes them with PyTorch alone, and networks that run on them.

What the whole engine is measured against: the same networks with the same weights in an ordinary
PyTorch build, which is our reading of what a careful author of 2020 would write:

- convolutions are `F.conv2d` and `F.conv3d`, a separable one two of them, resampling is apart,
  nothing is folded;
- the norm takes `var_mean` and is then one multiply-add per value, as BigGAN's code where it cannot
  use PyTorch's batch norm (here: statistics of every frame by themselves);
- the ConvGRU runs frame by frame, r and u in one convolution over [h; x], c in one over [x; r*h];
- every layer divides its own weight, after a power iteration in every pass that trains it, as
  `torch.nn.utils.parametrizations.spectral_norm` does;
- autograd keeps what it keeps: of the norm, its input and the ReLU's output.

In fp32 that is contiguous (NCHW), in bf16 channels last, the faster layout for cuDNN there. Weights
are fp32 in both.

Shapes: B batch, T frames, I input and O output channels, C channels, H x W pixels; weights have
their input channels last.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from engine.models.operators import hand_operators
from kernels.common.layout import channels_last
from kernels.frame_norm import EPSILON

Residual = Tensor | kernels.UpsampledShortcut | None


class PlainNormalized(NamedTuple):
    """What a norm hands to a convolution: its result."""

    video: Tensor

    def value(self) -> Tensor:
        """The video."""
        return self.video


def _behind_norms(operator: Callable[..., Tensor]) -> Callable[..., Any]:
    """An operator that also takes what a norm hands on, and then measures no moments."""

    @wraps(operator)
    def run(operators: "PlainOperators", x_BTIHW: Any, *arguments: Any, **named: Any) -> Any:
        if isinstance(x_BTIHW, PlainNormalized):
            return kernels.Measured(operator(operators, x_BTIHW.video, *arguments, **named), None)
        return operator(operators, x_BTIHW, *arguments, **named)

    return run


class PlainOperators:
    """Every operator that models call, under the same name: networks are handed one of these."""

    def __init__(self, *, channels_last: bool) -> None:
        self.channels_last = channels_last
        self._gru_cell = _gru_cell

    def compile(self) -> None:
        """For networks that torch.compile traces: of a ConvGRU it is given one step.

        All of them, 50 frames in five units, would compile for longer than anyone waits.
        """
        self._gru_cell = torch.compile(_gru_cell)
        disabled = torch.compiler.disable(self.conv_gru, recursive=False)
        setattr(self, "conv_gru", disabled)  # noqa: B010 - mypy refuses a method's assignment

    @contextmanager
    def handed_to(self, *networks: nn.Module) -> Iterator[None]:
        """Within this context the networks run on these, and after it on `kernels` again."""
        for network in networks:
            hand_operators(network, self)
        try:
            yield
        finally:
            for network in networks:
                hand_operators(network, kernels)

    # ---------------------------------------------------------------------- convolutions

    @_behind_norms
    def conv2d(
        self,
        x_BTIHW: Tensor,
        weight_OhwI: Tensor,
        bias_O: Tensor | None = None,
        *,
        residual_BTOHW: Residual = None,
        skip: kernels.LowSkip | None = None,
        relu: bool = False,
        only_graph: bool = False,
    ) -> Tensor:
        """Every frame by itself."""
        weight, bias = self._parameters(x_BTIHW, weight_OhwI, bias_O)
        y = F.conv2d(self._video(x_BTIHW).flatten(0, 1), weight, bias, padding="same")
        y = self._plus(y.unflatten(0, x_BTIHW.shape[:2]), residual_BTOHW, skip)
        return F.relu(y) if relu else y

    def conv3d(
        self,
        x_BTIHW: Tensor,
        weight_OthwI: Tensor,
        bias_O: Tensor | None = None,
        *,
        residual_BTOHW: Residual = None,
        relu: bool = False,
        only_graph: bool = False,
    ) -> Tensor:
        """In time and space at once."""
        weight, bias = self._parameters(x_BTIHW, weight_OthwI, bias_O)
        y = F.conv3d(self._volume(x_BTIHW), weight, bias, padding="same").transpose(1, 2)
        y = self._plus(y, residual_BTOHW)
        return F.relu(y) if relu else y

    @_behind_norms
    def upsample_conv(
        self, x_BTIHW: Tensor, weight_OhwI: Tensor, bias_O: Tensor | None = None
    ) -> Tensor:
        """Upsample, then convolve."""
        return self.conv2d(self._upsampled(x_BTIHW), weight_OhwI, bias_O)

    def conv_pool2d(
        self,
        x_BTIHW: Tensor,
        weight_OhwI: Tensor,
        bias_O: Tensor | None = None,
        *,
        residual_BTOHW: Residual = None,
        only_graph: bool = False,
    ) -> Tensor:
        """Convolve, then pool."""
        y = self.average_pool(self.conv2d(x_BTIHW, weight_OhwI, bias_O))
        return self._plus(y, residual_BTOHW)

    def conv_pool3d(
        self,
        x_BTIHW: Tensor,
        weight_OthwI: Tensor,
        bias_O: Tensor | None = None,
        *,
        residual_BTOHW: Residual = None,
        pooling: kernels.Pooling = (1, 2, 2),
        only_graph: bool = False,
    ) -> Tensor:
        """Convolve, then pool."""
        y = self.average_pool(self.conv3d(x_BTIHW, weight_OthwI, bias_O), pooling)
        return self._plus(y, residual_BTOHW)

    def average_pool(self, x_BTCHW: Tensor, pooling: kernels.Pooling = (1, 2, 2)) -> Tensor:
        """Frame by frame where time is kept."""
        if pooling[0] == 1:
            y = F.avg_pool2d(self._video(x_BTCHW).flatten(0, 1), 2)
            return y.unflatten(0, x_BTCHW.shape[:2])
        return F.avg_pool3d(self._volume(x_BTCHW), pooling).transpose(1, 2)

    @_behind_norms
    def separable_conv3d(
        self,
        x_BTIHW: Tensor,
        temporal_weight_OtI: Tensor,
        spatial_weight_OhwO: Tensor,
        bias_O: Tensor | None = None,
        **added: Any,
    ) -> Tensor:
        """A convolution over time, then one over space."""
        mixed = self.conv3d(x_BTIHW, temporal_weight_OtI[:, :, None, None])
        return self.conv2d(mixed, spatial_weight_OhwO, bias_O, **added)

    def conv_gru(
        self,
        x_BTCHW: Tensor,
        weight_r: Tensor,
        weight_u: Tensor,
        weight_c: Tensor,
        bias_r_C: Tensor,
        bias_u_C: Tensor,
        bias_c_C: Tensor,
    ) -> Tensor:
        """Frame by frame; the first h is a frame of zeros like any other."""
        weights_ru, biases_ru = torch.cat([weight_r, weight_u]), torch.cat([bias_r_C, bias_u_C])
        weight_ru, bias_ru = self._parameters(x_BTCHW, weights_ru, biases_ru)
        weight_c, bias_c = self._parameters(x_BTCHW, weight_c, bias_c_C)
        frames = self._video(x_BTCHW).unbind(1)
        h, states = torch.zeros_like(frames[0]), []
        for x in frames:
            h = self._gru_cell(x, h, weight_ru, bias_ru, weight_c, bias_c)
            states.append(h if not self.channels_last else h.permute(0, 2, 3, 1))
        y = torch.stack(states, dim=1)
        return y.permute(0, 1, 4, 2, 3) if self.channels_last else y

    # ---------------------------------------------------------------- everything else

    def Normalized(
        self,
        video: Tensor,
        gain: Tensor,
        bias: Tensor,
        statistics: tuple[Tensor, Tensor] | None = None,
        *_: Any,
        **__: Any,
    ) -> PlainNormalized:
        """The norm and its ReLU, computed here and now."""
        if statistics is None:
            var_TC, mean_TC = torch.var_mean(video, dim=(0, 3, 4), correction=0)
        else:
            mean_TC, var_TC = statistics
        scale_BTC = gain[:, None] * torch.rsqrt(var_TC + EPSILON)
        shift_BTC = bias[:, None] - mean_TC * scale_BTC
        scale, shift = (v.to(video.dtype)[..., None, None] for v in (scale_BTC, shift_BTC))
        y = F.relu(torch.addcmul(shift, self._video(video), scale), inplace=True)
        return PlainNormalized(y)

    def add_low_skip(self, y_BTOHW: Tensor, skip: kernels.LowSkip) -> Tensor:
        """Project x_l, repeat its frames, add."""
        step = y_BTOHW.shape[1] // skip.video.shape[1]
        rows = skip.video.shape[3] // y_BTOHW.shape[3]
        columns = skip.video.shape[4] // y_BTOHW.shape[4]
        low = skip.video[..., ::rows, ::columns].to(y_BTOHW.dtype)
        return y_BTOHW + self.conv2d(low, skip.weight, skip.bias).repeat_interleave(step, dim=1)

    def spectral_normalize(
        self, weight: Tensor, u_R: Tensor, v_K: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """One power iteration if the weight is trained, then W over its largest singular value."""
        matrix = weight.flatten(1)
        if weight.requires_grad:
            with torch.no_grad():
                v = F.normalize(matrix.T.mv(u_R), dim=0)
                u = F.normalize(matrix.mv(v), dim=0)
                u_R.copy_(u)
                v_K.copy_(v)
        else:
            u, v = u_R, v_K
        return (weight / torch.dot(u, matrix.mv(v))).to(dtype or weight.dtype)

    def power_iteration_(self, *_: Any) -> None:
        """Done in every pass instead."""

    # --------------------------------------------------------------------------- layout

    def _video(self, x_BTCHW: Tensor) -> Tensor:
        return channels_last(x_BTCHW) if self.channels_last else x_BTCHW.contiguous()

    def _volume(self, x_BTIHW: Tensor) -> Tensor:
        """[B, I, T, H, W], a view; PyTorch makes it contiguous itself where it should be."""
        return self._video(x_BTIHW).transpose(1, 2)

    def _parameters(
        self, x: Tensor, weight_OkI: Tensor, bias_O: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """[O, I, taps] in the dtype of x and this layout."""
        weight = weight_OkI.movedim(-1, 1).to(x.dtype)
        weight = weight if self.channels_last else weight.contiguous()
        return weight, None if bias_O is None else bias_O.to(x.dtype)

    def _upsampled(self, x_BTCHW: Tensor) -> Tensor:
        up = F.interpolate(self._video(x_BTCHW).flatten(0, 1), scale_factor=2.0, mode="nearest")
        return up.unflatten(0, x_BTCHW.shape[:2])

    def _plus(self, y: Tensor, residual: Residual, skip: kernels.LowSkip | None = None) -> Tensor:
        if isinstance(residual, kernels.UpsampledShortcut):
            video, weight, bias = residual
            shortcut: Tensor = self.conv2d(self._upsampled(video), weight, bias)
            residual = shortcut
        y = y if residual is None else y + residual
        return y if skip is None else self.add_low_skip(y, skip)


def _gru_cell(
    x_BCHW: Tensor,
    h_BCHW: Tensor,
    weight_ru: Tensor,
    bias_ru: Tensor | None,
    weight_c: Tensor,
    bias_c: Tensor | None,
) -> Tensor:
    gates = F.conv2d(torch.cat([h_BCHW, x_BCHW], dim=1), weight_ru, bias_ru, padding=1)
    r, u = torch.sigmoid(gates).chunk(2, dim=1)
    candidate = F.conv2d(torch.cat([x_BCHW, r * h_BCHW], dim=1), weight_c, bias_c, padding=1)
    return u * h_BCHW + (1 - u) * F.relu(candidate)
