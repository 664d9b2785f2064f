"""Per-frame conditional batch norm, and the statistics that inference fixes.

A norm works in one of three modes: on the batch's statistics (training), on the batch's while
accumulating them (`collect_statistics`, the paper's dummy passes), or on fixed ones.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from engine.errors import UserError
from engine.models.features import Features, NormalizedFeatures
from engine.models.operators import OperatorLayer
from engine.models.prepared import Prepared, PreparedLayer, layers_of
from engine.models.spectral import SpectralWeight
from kernels.frame_norm import EPSILON


class Modulation(PreparedLayer):
    """offset + Ŵ·cond, [B, K] → [B, C], fp32: a norm's gain (offset 1) or bias (0)."""

    def __init__(self, condition_size: int, channels: int, *, offset: float) -> None:
        super().__init__()
        self.normalized = SpectralWeight(channels, condition_size, kept_dtype=True)
        self.channels, self.offset = channels, offset

    def forward(self, condition_BK: Tensor) -> Tensor:
        """What the pass has prepared for its condition, or computed here."""
        if self.prepared is not None:
            return self.prepared
        return self.shifted(F.linear(condition_BK, self.normalized(condition_BK.dtype)))

    def shifted(self, product: Tensor) -> Tensor:
        """By the offset."""
        return self.offset + product if self.offset else product


def modulated_norms(network: nn.Module, condition_BK: Tensor) -> Prepared:
    """All gains and biases of a network's norms for one condition; to be used by `with`.

    One product for all that have as many channels. Where weights are not prepared either, every
    norm computes its own.
    """
    groups: dict[tuple[int, float], list[Modulation]] = defaultdict(list)
    for layer in layers_of(network, Modulation):
        if layer.normalized.prepared is not None:
            groups[layer.channels, layer.offset].append(layer)
    prepared: dict[PreparedLayer, Tensor | None] = {}
    for layers in groups.values():
        weights_GCK = torch.stack([layer.normalized(condition_BK.dtype) for layer in layers])
        product_GBC: Tensor = _Products.apply(condition_BK, weights_GCK)
        prepared |= zip(layers, layers[0].shifted(product_GBC).unbind(), strict=True)
    return Prepared(prepared)


class _Products(torch.autograd.Function):
    """W_g cond of every weight, [G, B, C]. By itself PyTorch would make gradients of the weights
    whose every slice is transposed, and copied by who reads it."""

    @staticmethod
    def forward(ctx: Any, condition_BK: Tensor, weights_GCK: Tensor) -> Tensor:
        ctx.save_for_backward(condition_BK, weights_GCK)
        conditions_GBK = condition_BK.expand(len(weights_GCK), -1, -1)
        return torch.bmm(conditions_GBK, weights_GCK.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        condition_BK, weights_GCK = ctx.saved_tensors
        (dy_GBC,) = grads
        dcondition = dweights = None
        if ctx.needs_input_grad[0]:
            dcondition = torch.bmm(dy_GBC, weights_GCK).sum(0)
        if ctx.needs_input_grad[1]:
            conditions_GBK = condition_BK.expand(len(weights_GCK), -1, -1)
            dweights = torch.bmm(dy_GBC.transpose(1, 2), conditions_GBK)
        return dcondition, dweights


class FrameNorm(OperatorLayer):
    """relu(gain · normalised x + bias), gain = 1 + W_g·cond and bias = W_b·cond per sample.

    Statistics are of every (time step, channel) over batch and space (SSW-GAN). `is_last` says that
    no norm comes after the convolution that reads this one.
    """

    mean: Tensor | None
    var: Tensor | None

    def __init__(self, channels: int, condition_size: int, *, is_last: bool = False) -> None:
        super().__init__()
        self.is_last = is_last
        self.gain = Modulation(condition_size, channels, offset=1)
        self.bias = Modulation(condition_size, channels, offset=0)
        # Not in the state_dict: they belong to one length, and to sampling.
        self.register_buffer("mean", None, persistent=False)
        self.register_buffer("var", None, persistent=False)
        self._accumulated: _Moments | None = None
        self.group: dist.ProcessGroup | None = None
        """The ranks whose samples share the batch's statistics; None for this rank alone."""
        self.keeps_result = False
        """Whether the normalised x is kept for the backward pass, not made again there."""

    def forward(self, x: Features, condition_BK: Tensor) -> NormalizedFeatures:
        """Describes the norm; the next convolution computes it.

        Raises UserError at a length other than the fixed.
        """
        x_BTCHW, moments, frames_BT = x
        gain, bias = self.gain(condition_BK), self.bias(condition_BK)
        statistics: tuple[Tensor, Tensor] | None = None
        if frames_BT is not None:
            gain, bias, statistics = self._of_frames(gain, bias, frames_BT)
        elif self.mean is not None and self.var is not None:
            self.check_length(x_BTCHW.shape[1])
            statistics = self.mean, self.var
        elif self._accumulated is not None:
            statistics = self.operators.frame_statistics(x_BTCHW)
            self._accumulated.add(*statistics)
        of_batch = statistics is None
        normalized = self.operators.Normalized(
            x_BTCHW,
            gain,
            bias,
            statistics,
            group=self.group if of_batch else None,
            moments=moments,
            kept=self.keeps_result,
            wants_moments=of_batch and not self.is_last,  # the next norm's are the batch's, too
        )
        return NormalizedFeatures(normalized, frames_BT)

    def _of_frames(
        self, gain_BC: Tensor, bias_BC: Tensor, frames_BT: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Gain and bias, each [B, T, C], that contain the frames' fixed statistics, and statistics
        that change nothing: an operator takes one mean and variance for all samples."""
        if self.mean is None or self.var is None:
            raise ValueError("frames of a clip have no statistics of their own; fix the clip's")
        scale_BTC = gain_BC[:, None] * torch.rsqrt(self.var + EPSILON)[frames_BT]
        shift_BTC = bias_BC[:, None] - self.mean[frames_BT] * scale_BTC
        none_TC = torch.zeros_like(scale_BTC[0])
        return scale_BTC, shift_BTC, (none_TC, none_TC + (1 - EPSILON))

    def check_length(self, num_frames: int) -> None:
        """Raises UserError where statistics are fixed for videos of another length."""
        if self.mean is not None and len(self.mean) != num_frames:
            raise UserError(
                f"norm statistics are fixed for {len(self.mean)} frames, but the video has "
                f"{num_frames}; collect them again at that length"
            )

    def start_accumulating(self) -> None:
        """Use the batch's statistics again and remember them from now on."""
        self.fix(None)
        self._accumulated = _Moments()

    def fix_accumulated(self) -> None:
        """Use the average of what was remembered. Raises RuntimeError when nothing was."""
        if self._accumulated is None:
            raise RuntimeError("no statistics were accumulated")
        self.fix(self._accumulated.statistics())

    def fix(self, statistics: tuple[Tensor, Tensor] | None) -> None:
        """Fix (mean_TC, var_TC); None returns to the batch's own."""
        self._accumulated = None
        self.mean, self.var = statistics or (None, None)


class _Moments:
    """Mean of means and of second moments over passes, in fp64: the subtraction cancels."""

    def __init__(self) -> None:
        self.num_passes = 0
        self.first: Tensor | None = None
        self.second: Tensor | None = None

    def add(self, mean_TC: Tensor, var_TC: Tensor) -> None:
        mean, var = mean_TC.detach().double(), var_TC.detach().double()
        second = var + mean.square()
        if self.first is None or self.second is None:
            self.first, self.second = mean, second
        elif self.first.shape != mean.shape:
            raise ValueError(
                f"statistics passes of {len(self.first)} and of {len(mean)} frames cannot be mixed"
            )
        else:
            self.first, self.second = self.first + mean, self.second + second
        self.num_passes += 1

    def statistics(self) -> tuple[Tensor, Tensor]:
        if self.first is None or self.second is None:
            raise RuntimeError("no pass ran through this norm while statistics were collected")
        mean = self.first / self.num_passes
        var = (self.second / self.num_passes - mean.square()).clamp_min(0)
        return mean.float(), var.float()


def frame_norms(module: nn.Module) -> dict[str, FrameNorm]:
    """Every norm of a generator (or of a cascade of them) by its module path."""
    return {name: norm for name, norm in module.named_modules() if isinstance(norm, FrameNorm)}


def synchronize_norms(module: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Take the batch's statistics over all ranks of `group`; None returns to each rank's own.

    From then on every pass on the batch's statistics is collective.
    """
    for norm in frame_norms(module).values():
        norm.group = group


@torch.no_grad()
def collect_statistics(
    generator: nn.Module, run_pass: Callable[[int], Any], num_passes: int
) -> None:
    """Fix the norm statistics to their average over `num_passes` calls of `run_pass(i)`.

    Each call runs the generator (or cascade) once, at the length that will be generated; the
    paper uses 200 passes. If a pass fails, the norms are left on batch statistics.
    """
    if num_passes < 1:
        raise ValueError(f"statistics need at least one pass, not {num_passes}")
    norms = frame_norms(generator).values()
    for norm in norms:
        norm.start_accumulating()
    try:
        for i in range(num_passes):
            run_pass(i)
        for norm in norms:
            norm.fix_accumulated()
    except BaseException:
        fix_norm_statistics(generator, None)
        raise


def norm_statistics(generator: nn.Module) -> dict[str, Tensor]:
    """The fixed statistics: '<norm>.mean' and '<norm>.var', each [T, C] fp32; {} if not fixed."""
    return {
        f"{name}.{which}": value
        for name, norm in frame_norms(generator).items()
        for which, value in (("mean", norm.mean), ("var", norm.var))
        if value is not None
    }


def fix_norm_statistics(generator: nn.Module, statistics: dict[str, Tensor] | None) -> None:
    """Fix what `norm_statistics` returned; None returns every norm to the batch's statistics.

    Raises UserError when the statistics are not of this network.
    """
    norms = frame_norms(generator)
    if statistics is None:
        for norm in norms.values():
            norm.fix(None)
        return
    expected = {f"{name}.{which}" for name in norms for which in ("mean", "var")}
    if expected != statistics.keys():
        odd = min(expected ^ statistics.keys())
        raise UserError(f"norm statistics are not of this generator: {odd} is in only one of them")
    for name, norm in norms.items():
        mean_TC, var_TC = statistics[f"{name}.mean"], statistics[f"{name}.var"]
        channels = norm.gain.normalized.u.numel()
        if mean_TC.shape != var_TC.shape or mean_TC.shape[1:] != (channels,):
            raise UserError(
                f"norm statistics are not of this generator: {name} has {channels} channels, "
                f"they have shape {tuple(mean_TC.shape)}"
            )
        device = norm.gain.normalized.u.device
        norm.fix((mean_TC.float().to(device), var_TC.float().to(device)))
