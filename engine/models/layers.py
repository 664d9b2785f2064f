"""Spectrally normalised, orthogonally initialised layers: every weight of G and D is one of these.

Weights are stored [O, ...] with input channels last and kept in fp32 (decided: Adam's steps are too
small for bf16); a layer computes in the dtype of its input (`Linear`, convolutions) by casting the
normalised weight. Power iteration is no part of a forward pass: the training loop calls
`update_spectral_norm` once per optimiser step, so that checkpointed, repeated and accumulated
passes all see one and the same σ. A network's pass divides all its weights and rounds all its
biases at once, in `normalized_weights`, unless they are partitioned.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from engine.models.prepared import Prepared, PreparedLayer, layers_of

_one_by_one = False
_INITIAL_ITERATIONS = 3  # an orthogonal matrix has σ = 1 for any u, so few are plenty


class SpectralWeight(PreparedLayer):
    """A weight [O, ...] divided by its largest singular value.

    It is a module of its own so that hooks which gather partitioned parameters around a module's
    forward (DeepSpeed ZeRO-3) work: nothing outside reads `.weight`.

    `fold` is what the operator that uses the weight folds into it. A layer of `kept_dtype` computes
    in the weight's own dtype, fp32, whatever the network does.
    """

    u: Tensor
    v: Tensor

    def __init__(self, *shape: int, fold: kernels.Fold = None, kept_dtype: bool = False) -> None:
        super().__init__()
        self.fold, self.kept_dtype = fold, kept_dtype
        self.weight = nn.Parameter(torch.empty(shape))
        self.register_buffer("u", torch.empty(shape[0]))
        self.register_buffer("v", torch.empty(self.weight[0].numel()))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Orthogonal matrix [O, rest] and its singular vectors; nothing on the meta device."""
        if self.weight.is_meta:
            return
        nn.init.orthogonal_(self.weight)
        nn.init.normal_(self.u)
        kernels.power_iteration_([self.weight], [self.u], [self.v], _INITIAL_ITERATIONS)

    def forward(self, dtype: torch.dtype | None = None) -> Tensor:
        """weight / σ, cast to `dtype`; None leaves it as it is kept.

        None of a weight with a `fold` may also be the kernel with the fold in it, in the dtype that
        the network computes in: where the pass has prepared it. The shapes tell them apart.
        """
        folds, weight, prepared = self.fold is not None, self.weight, self.prepared
        if weight is None:  # settled
            assert prepared is not None
            assert dtype in (None, prepared.dtype), "it is kept in one dtype only"
            return prepared
        if prepared is not None and (
            dtype is None if folds else prepared.dtype == (dtype or weight.dtype)
        ):
            return prepared
        return kernels.spectral_normalize(weight, self.u, self.v, dtype)


def normalized_weights(
    network: nn.Module, dtype: torch.dtype, *, impl: str | None = None
) -> Prepared:
    """All weights of a network that computes in `dtype`, divided at once, and its biases, rounded
    at once; to be used by `with`.

    Around one forward pass: they are those of this moment. Their gradients all come at the end of
    the backward pass. `impl` is one of `kernels.spectral_normalize_all`'s.

    Nothing is prepared where the weights are settled. Nothing is, and every layer divides its own,
    where the references are to run, which find nothing folded into a weight; where weights are
    partitioned (ZeRO-3): those are whole only inside their own module's forward and backward, also
    if they happen to be gathered now; and inside `divided_one_by_one`. A layer that is asked for
    another dtype than was prepared divides its own, too.
    """
    layers = spectral_weights(network)
    if _one_by_one or _settled(layers):
        return Prepared({})
    if impl is None and _run_references(layers):
        return Prepared({})
    if any(_is_partitioned(_weight(layer)) for layer in layers):
        return Prepared({})
    prepared: dict[PreparedLayer, Tensor] = dict(
        zip(layers, _divided(layers, dtype, impl), strict=True)
    )
    return Prepared(prepared | rounded_biases(network, dtype))


def rounded_biases(network: nn.Module, dtype: torch.dtype) -> dict[PreparedLayer, Tensor]:
    """The biases of a network's layers in the dtype that it computes in, rounded at once; none
    where there is nothing to round."""
    # Those of an odd size come last: the others' values are where wide loads find them.
    layers = sorted(
        (layer for layer in layers_of(network, BiasedLayer) if layer.rounds_to(dtype)),
        key=lambda layer: layer.num_biases % 64 != 0,
    )
    if not layers:
        return {}
    together = torch.cat([layer.bias for layer in layers if layer.bias is not None]).to(dtype)
    return dict(zip(layers, together.split([layer.num_biases for layer in layers]), strict=True))


@torch.no_grad()
def settle_weights(network: nn.Module, dtype: torch.dtype) -> None:
    """Divide the weights of a network that trains no more, once for all passes to come.

    They themselves are dropped: the network keeps them folded and in `dtype`, and is neither saved
    nor loaded again. Nothing is done where the references are to run, as in `normalized_weights`,
    or where it has been done.
    """
    layers = spectral_weights(network)
    if _settled(layers) or _run_references(layers):
        return
    for layer, kernel in zip(layers, _divided(layers, dtype, None), strict=True):
        layer.prepare(kernel)
        layer.register_parameter("weight", None)
    for biased, bias in rounded_biases(network, dtype).items():
        biased.prepare(bias)


def _settled(layers: Sequence[SpectralWeight]) -> bool:
    return all(next(layer.parameters(), None) is None for layer in layers)


def _weight(layer: SpectralWeight) -> Tensor:
    # Not `layer.weight`: at ZeRO-3 DeepSpeed would gather it, and again in every later pass.
    return next(layer.parameters())


def _run_references(layers: Sequence[SpectralWeight]) -> bool:
    weight = _weight(layers[0])
    return kernels.chosen("spectral_normalize_all", weight.device, weight.dtype) == "reference"


def _divided(
    layers: Sequence[SpectralWeight], dtype: torch.dtype, impl: str | None
) -> list[Tensor]:
    return kernels.spectral_normalize_all(
        [layer.weight for layer in layers],
        [layer.u for layer in layers],
        [layer.v for layer in layers],
        [None if layer.kept_dtype else dtype for layer in layers],
        [layer.fold for layer in layers],
        impl=impl,
    )


@contextmanager
def divided_one_by_one() -> Iterator[None]:
    """Within this context no pass prepares its weights: every layer divides its own."""
    global _one_by_one
    before, _one_by_one = _one_by_one, True
    try:
        yield
    finally:
        _one_by_one = before


def _is_partitioned(weight: Tensor) -> bool:
    # What DeepSpeed marks its parameters with at ZeRO-3 and at no other stage.
    return weight.numel() == 0 or hasattr(weight, "ds_status")


def spectral_weights(module: nn.Module) -> list[SpectralWeight]:
    """Every spectrally normalised weight of a network, in a fixed order."""
    return layers_of(module, SpectralWeight)


def update_spectral_norm(module: nn.Module, num_iterations: int = 1) -> None:
    """Power iteration on every weight of a network, once per optimiser step.

    Reads `.weight` directly: under ZeRO-3 the caller gathers those of `spectral_weights(module)`.
    Not between a forward and its backward: backward needs the u and v that forward used.
    """
    layers = spectral_weights(module)
    kernels.power_iteration_(
        [layer.weight for layer in layers],
        [layer.u for layer in layers],
        [layer.v for layer in layers],
        num_iterations,
    )


class BiasedLayer(PreparedLayer):
    """A layer with a bias, zero at first, of which a pass may have prepared the rounded one."""

    bias: nn.Parameter | None

    def __init__(self, num_biases: int, *, kept_dtype: bool = False) -> None:
        super().__init__()
        self.num_biases, self._kept_dtype = num_biases, kept_dtype
        self.bias = nn.Parameter(torch.zeros(num_biases)) if num_biases else None

    def rounds_to(self, dtype: torch.dtype) -> bool:
        """Whether there is a bias, and another one in a network that computes in `dtype`."""
        return self.bias is not None and not self._kept_dtype and self.bias.dtype != dtype

    def bias_in(self, dtype: torch.dtype | None) -> Tensor:
        """The bias; None stands for the dtype that it is kept in, or for the prepared one's."""
        if self.prepared is not None and dtype in (None, self.prepared.dtype):
            return self.prepared
        assert self.bias is not None
        return self.bias.to(dtype or self.bias.dtype)


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


class Convolution(BiasedLayer):
    """The weight and bias of one convolution; the block that owns it names the operator.

    Shape of the weight: [out, *kernel_size, in]. `fold` is what the operator folds into it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int] = (3, 3),
        *,
        fold: kernels.Fold = None,
    ) -> None:
        super().__init__(out_channels)
        self.normalized = SpectralWeight(out_channels, *kernel_size, in_channels, fold=fold)

    def forward(self, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        """(normalised weight, bias), both in `dtype`.

        None leaves them as they are kept: for operators that fold a weight before they round it.
        Where the pass has prepared them, they are the kernel already folded, and both rounded.
        """
        return self.normalized(dtype), self.bias_in(dtype)


class SeparableConvolution(BiasedLayer):
    """Weights of a temporal (3) and a spatial (3x3) convolution with one bias after both.

    Decided: the pair stands for one convolution of the block, so it has one bias.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(out_channels)
        self.temporal = SpectralWeight(out_channels, 3, in_channels)
        self.spatial = SpectralWeight(out_channels, 3, 3, out_channels)

    def forward(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """(temporal weight [O, 3, I], spatial weight [O, 3, 3, O], bias), in `dtype`."""
        return self.temporal(dtype), self.spatial(dtype), self.bias_in(dtype)


class ConvGRU(nn.Module):
    """Convolutional GRU whose hidden state has the input's channels (3x3, ReLU candidate)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reset = Convolution(2 * channels, channels)
        self.update = Convolution(2 * channels, channels)
        self.candidate = Convolution(2 * channels, channels)

    def forward(self, x_BTCHW: Tensor) -> Tensor:
        """Every hidden state, [B, T, C, H, W]."""
        gates = [gate(x_BTCHW.dtype) for gate in (self.reset, self.update, self.candidate)]
        weights, biases = zip(*gates, strict=True)
        return kernels.conv_gru(x_BTCHW, *weights, *biases)
