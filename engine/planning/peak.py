"""The most memory that a rank needs in a step: activations over time, and what DeepSpeed holds."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from engine.configuration import Training
from engine.planning.counters import FORWARD
from engine.planning.meta_step import Step
from engine.planning.zero_memory import VALUE_BYTES, ZeroMemory, bucket_bytes


class Scaling(NamedTuple):
    """How a stage's training is spread over ranks."""

    zero_stage: int
    num_ranks: int
    accumulates: bool


@dataclass(frozen=True)
class Peak:
    """Bytes at the moment when a rank holds most."""

    update: str
    """Whose update it is in, "D" or "G"."""
    phase: str
    """What runs."""
    parameters: int
    """Weights of G, D and the frozen stages, u and v of spectral norm; gathered ones too."""
    optimizer: int
    """Adam's moments, the weights it updates and DeepSpeed's permanent buffers, on the device."""
    gradients: int
    """With the buckets that reduce them."""
    activations: int
    """All else."""
    host: int
    """Besides, in main memory, of an optimizer that is offloaded; not in the total."""

    @property
    def total(self) -> int:
        """The sum."""
        return self.parameters + self.optimizer + self.gradients + self.activations


def networks_of(step: Step, training: Training, scaling: Scaling) -> dict[str, ZeroMemory]:
    """What DeepSpeed holds for D and G."""
    sizes = {"D": step.discriminator_sizes, "G": step.generator_sizes}
    return {
        name: ZeroMemory(
            network,
            scaling.zero_stage,
            scaling.num_ranks,
            bucket_bytes(training),
            accumulates=scaling.accumulates,
            offload=training.offload_optimizer and scaling.zero_stage > 0,
        )
        for name, network in sizes.items()
    }


def find_peak(step: Step, training: Training, scaling: Scaling) -> Peak:
    """Over both updates, their passes and what follows each backward pass.

    ZeRO-0 offloads nothing. ZeRO-3 is counted with the activations of the other stages, and all
    weights gathered.
    """
    networks = networks_of(step, training, scaling)
    # What a step's `parameter_bytes` has of G and D is what they are without ZeRO.
    parameters = step.parameter_bytes + sum(
        network.weights - network.whole + network.gathered for network in networks.values()
    )
    if training.ema_decay is not None:
        parameters += VALUE_BYTES * sum(step.generator_sizes)
    optimizer = sum(network.optimizer for network in networks.values())
    host = sum(network.host for network in networks.values())
    return max(
        (
            Peak(name, phase, parameters, optimizer, gradients, activations, host)
            for name, network in networks.items()
            for phase, gradients, activations in _moments(step, name, network)
        ),
        key=lambda peak: peak.total,
    )


def _moments(step: Step, name: str, network: ZeroMemory) -> Iterable[tuple[str, int, int]]:
    """Phase, bytes in place of the gradients, and activations."""
    most = step.updates[name].most
    for (phase, num_bytes), activations in most.items():
        yield phase, network.gradients(num_bytes), activations
    all_gradients = max(num_bytes for _, num_bytes in most)
    yield "optimizer", network.update, most[FORWARD, all_gradients]
