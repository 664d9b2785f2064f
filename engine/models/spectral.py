"""Spectral normalisation of a network's weights (Miyato et al. 2018; the paper: in G and D).

Weights are stored [O, ...] with input channels last and kept in fp32 (decided: Adam's steps are too
small for bf16). Power iteration is no part of a forward pass: the training loop calls
`update_spectral_norm` once per optimiser step, so that checkpointed, repeated and accumulated
passes all see one and the same σ. `normalized_weights` divides all weights of a network and rounds
all its biases at once for a pass, unless they are partitioned.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import kernels
from engine.models.biases import rounded_biases
from engine.models.operators import OperatorLayer, operators_of
from engine.models.prepared import Prepared, PreparedLayer, layers_of

_one_by_one = False
_INITIAL_ITERATIONS = 3  # an orthogonal matrix has σ = 1 for any u, so few are plenty


class SpectralWeight(OperatorLayer, PreparedLayer):
    """A weight [O, ...] divided by its largest singular value.

    It is a module of its own so that hooks which gather partitioned parameters around a module's
    forward (DeepSpeed ZeRO-3) work: nothing outside reads `.weight`.

    A weight is in one of three states:

    own       it divides itself, whenever it is asked for;
    prepared  the pass at hand has divided it together with all others (`normalized_weights`);
    settled   it was divided once for all passes to come, and is gone (`settle_weights`).

    `fold` is what the operator that uses the weight folds into it. A layer of `kept_dtype` computes
    in the weight's own dtype, fp32, whatever the network does.
    """

    u: Tensor
    v: Tensor

    def __init__(self, *shape: int, fold: kernels.Fold = None, kept_dtype: bool = False) -> None:
        super().__init__()
        self.fold, self.kept_dtype = fold, kept_dtype
        self.is_settled = False
        """Whether the weight is gone. Not asked of the weight, which ZeRO-3 would gather for it."""
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

    def forward(self, dtype: torch.dtype | None = None) -> Tensor | kernels.Folded:
        """weight / σ in `dtype`; None leaves it in the dtype that it is kept in.

        A weight with a `fold` is asked with None, because its operator rounds after folding. If it
        is prepared or settled, it has the fold in it and is in the network's dtype: `Folded`.
        """
        prepared = self.prepared
        if self.is_settled:
            assert prepared is not None
            assert dtype in (None, prepared.dtype), "it is kept in one dtype only"
        elif prepared is None or not self._is_asked_for(dtype, prepared):
            own: Tensor = self.operators.spectral_normalize(self.weight, self.u, self.v, dtype)
            return own
        return prepared if self.fold is None else kernels.Folded(prepared, self.fold)

    def _is_asked_for(self, dtype: torch.dtype | None, prepared: Tensor) -> bool:
        if self.fold is not None:
            return dtype is None
        return prepared.dtype == (dtype or self.weight.dtype)


def normalized_weights(
    network: nn.Module, dtype: torch.dtype, *, implementation: str | None = None
) -> Prepared:
    """All weights of a network that computes in `dtype`, divided at once, and its biases, rounded
    at once; to be used by `with`.

    Around one forward pass: they are those of this moment. Their gradients all come at the end of
    the backward pass. `implementation` is one of `kernels.spectral_normalize_all`'s.

    Nothing is prepared if the weights are settled. Nothing is prepared and every layer divides its
    own weight

    - if the references run, which fold nothing into a weight;
    - if the network was handed operators other than `kernels`;
    - if ZeRO-3 partitions the weights: they are whole only inside their own module's forward and
      backward, even if they happen to be gathered now;
    - inside `divided_one_by_one`.

    A layer that is asked for another dtype than was prepared divides its own weight, too.
    """
    layers = spectral_weights(network)
    if _one_by_one or _are_settled(layers):
        return Prepared({})
    if not _runs_kernels(network) or (implementation is None and _run_references(layers)):
        return Prepared({})
    if any(_is_partitioned(_weight(layer)) for layer in layers):
        return Prepared({})
    prepared: dict[PreparedLayer, Tensor] = dict(
        zip(layers, _divided(layers, dtype, implementation), strict=True)
    )
    return Prepared(prepared | rounded_biases(network, dtype))


@torch.no_grad()
def settle_weights(network: nn.Module, dtype: torch.dtype) -> None:
    """Divide the weights of a network that trains no more, once for all passes to come.

    They themselves are dropped: the network keeps them folded and in `dtype`, and is neither saved
    nor loaded again. Nothing is done where the references are to run, as in `normalized_weights`,
    or where it has been done.
    """
    layers = spectral_weights(network)
    if _are_settled(layers) or not _runs_kernels(network) or _run_references(layers):
        return
    for layer, kernel in zip(layers, _divided(layers, dtype, None), strict=True):
        layer.prepare(kernel)
        layer.register_parameter("weight", None)
        layer.is_settled = True
    for biased, bias in rounded_biases(network, dtype).items():
        biased.prepare(bias)


def _runs_kernels(network: nn.Module) -> bool:
    return operators_of(network) is kernels


def _are_settled(layers: Sequence[SpectralWeight]) -> bool:
    return all(layer.is_settled for layer in layers)


def _weight(layer: SpectralWeight) -> Tensor:
    # Not `layer.weight`: at ZeRO-3 DeepSpeed would gather it, and again in every later pass.
    return next(layer.parameters())


def _run_references(layers: Sequence[SpectralWeight]) -> bool:
    weight = _weight(layers[0])
    return kernels.chosen("spectral_normalize_all", weight.device, weight.dtype) == "reference"


def _divided(
    layers: Sequence[SpectralWeight], dtype: torch.dtype, implementation: str | None
) -> list[Tensor]:
    return kernels.spectral_normalize_all(
        [layer.weight for layer in layers],
        [layer.u for layer in layers],
        [layer.v for layer in layers],
        [None if layer.kept_dtype else dtype for layer in layers],
        [layer.fold for layer in layers],
        implementation=implementation,
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
    operators_of(module).power_iteration_(
        [layer.weight for layer in layers],
        [layer.u for layer in layers],
        [layer.v for layer in layers],
        num_iterations,
    )
