"""The most memory that one rank needs in a step: the networks' activations, and DeepSpeed's share.

`ZeroMemory` is what DeepSpeed allocates for one network beside its activations; `find_peak` adds it
to the activations that a counted step has at each moment.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from engine.configuration import Training
from engine.planning.counters import FORWARD
from engine.planning.meta_step import Step
from engine.trainer.deepspeed_engines import deepspeed_settings

VALUE_BYTES = 4  # fp32
ZERO_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class ZeroMemory:
    """Bytes that DeepSpeed allocates for one network on one rank.

    DeepSpeed 0.19.8 with fp32 weights, the settings of `engine.trainer.deepspeed_engines` and a
    fused Adam, which needs no memory of its own in an update. The formulas are taken from its
    source, and a test holds them against what it really allocates. In bytes, with P all weights,
    p = P / ranks a rank's partition, q the gradients of all weights that a partition touches, and
    B a bucket into which gradients are copied to be reduced:

    | ZeRO | at rest               | gradients in a backward pass      | from its end on       |
    |------|-----------------------|-----------------------------------|-----------------------|
    | 0    | P, moments 2P         | what there is, up to P            | P, and P to reduce it |
    | 1    | P, copy p, moments 2p | what there is, and B              | P + B or P + q        |
    | 2    | as 1                  | B, and up to q; accumulated q     | q + p                 |
    | 3    | 3p, moments 2p, B     | no more; all weights P gathered   | p                     |

    With accumulated micro-batches the gradients of the first are there during the others' passes.
    With the optimizer offloaded the copy, the moments and the gradients to apply are in main
    memory. At ZeRO-3 the weights that layers gather stay until the backward pass: DeepSpeed keeps
    up to 10^9 values that will be used again.

    `sizes` are the numbers of values of the network's weights. Their order matters: partitions are
    cut from all of them in a row.
    """

    sizes: Sequence[int]
    zero_stage: int
    num_ranks: int
    bucket_bytes: int
    accumulates: bool = False
    """Whether an update has more than one micro-batch."""
    offload: bool = False
    """Adam and its state in main memory."""
    rank: int | None = None
    """None is the one that holds most."""

    @property
    def whole(self) -> int:
        """P: all weights."""
        return VALUE_BYTES * sum(self.sizes)

    @property
    def partition(self) -> int:
        """p: a rank's partition of the weights."""
        return VALUE_BYTES * self._partition_values

    @property
    def _partition_values(self) -> int:
        # Every rank's begins at a multiple of two values.
        return 2 * -(-sum(self.sizes) // (2 * self.num_ranks))

    @property
    def touched(self) -> int:
        """q: the gradients of all weights that a partition touches."""
        cut, ends = self._partition_values, list(accumulate(self.sizes))
        # A partition in which no weight begins lies within one: what it touches, the one in which
        # that weight begins touches too. So ranks need not be counted through.
        begun = {(end - size) // cut for size, end in zip(self.sizes, ends, strict=True)}
        ranks = begun if self.rank is None else {self.rank}
        return VALUE_BYTES * max(
            sum(
                size
                for size, end in zip(self.sizes, ends, strict=True)
                if end - size < (rank + 1) * cut and end > rank * cut
            )
            for rank in ranks
        )

    @property
    def largest(self) -> int:
        """The largest weight."""
        return VALUE_BYTES * max(self.sizes)

    @property
    def weights(self) -> int:
        """On the device, always: the weights that layers read, or this rank's part of them."""
        return self.partition if self.zero_stage == 3 else self.whole

    @property
    def optimizer(self) -> int:
        """On the device, always: a copy of the weights that Adam updates, its moments, buffers."""
        match self.zero_stage:
            case 0:
                return 2 * self.whole
            case 3:
                return self.bucket_bytes + (0 if self.offload else 4 * self.partition)
            case _:
                return self.largest if self.offload else 3 * self.partition

    @property
    def host(self) -> int:
        """In main memory, with the optimizer offloaded."""
        if not self.offload:
            return 0
        accumulated = self.touched if self.accumulates and self.zero_stage == 2 else 0
        return 5 * self.partition + accumulated + (0 if self.zero_stage == 3 else self.largest)

    @property
    def gathered(self) -> int:
        """Whole weights that a pass gathers, at most."""
        return self.whole if self.zero_stage == 3 and self.num_ranks > 1 else 0

    def gradients(self, num_bytes: int) -> int:
        """Held during the passes in place of so many bytes of gradients in `.grad`."""
        begun = num_bytes > 0 or self.accumulates
        match self.zero_stage:
            case 0:
                return self.whole if self.accumulates else num_bytes
            case 1:
                there = self.whole if self.accumulates else num_bytes
                return there + (self.bucket_bytes if begun else 0)
            case 2:
                earlier = self.touched if self.accumulates and not self.offload else 0
                kept = 0 if self.offload else min(num_bytes, self.touched)
                return earlier + kept + (self.bucket_bytes if begun else 0)
            case _:
                return 0

    @property
    def update(self) -> int:
        """The most held from the last backward pass on, beside the weights and the optimizer."""
        applied = self.touched + self.partition  # in one piece, as Adam takes them
        match self.zero_stage:
            case 0:
                return 2 * self.whole
            case 1:
                # Bucket by bucket gradients move into it, and those of the partition out of it.
                slack = min(self.largest, self.bucket_bytes)
                kept = 0 if self.offload else self.touched + slack
                reduced = max(self.whole + self.bucket_bytes, self.whole + kept)
                return reduced if self.offload else max(reduced, applied)
            case 2:
                return self.bucket_bytes if self.offload else applied
            case _:
                return self.largest if self.offload else self.partition


def bucket_bytes(training: Training) -> int:
    """B, as the trainer sets it, whatever the micro-batch."""
    training = training.model_copy(update={"micro_batch": 1})
    settings = deepspeed_settings(training, world_size=1, accumulation_steps=1)
    return VALUE_BYTES * int(settings["zero_optimization"]["reduce_bucket_size"])


def communicated_bytes(memory: ZeroMemory, num_micro_batches: int) -> float:
    """Bytes that a rank sends for one update of the network, in rings.

    A reduction to everyone is 2 P, one to each its own or a gathering P, each less the own share.
    """
    passes = {
        0: 2,  # all-reduce
        1: 3,  # all-reduce of gradients, gathering of weights
        2: 2 * num_micro_batches + 1,
        # Reduce-scatter; weights for the pass, once more for spectral norm.
        3: (1 + 1) * num_micro_batches + 1,
    }
    share = 1 - 1 / memory.num_ranks
    return passes[memory.zero_stage] * memory.whole * share


class Scaling(NamedTuple):
    """How a stage's training is spread over ranks."""

    zero_stage: int
    num_ranks: int
    accumulates: bool


@dataclass(frozen=True)
class PeakMemory:
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
    """Main memory that an offloaded optimizer takes; it is not in the total."""

    @property
    def total(self) -> int:
        """The sum."""
        return self.parameters + self.optimizer + self.gradients + self.activations


def networks_of(step: Step, training: Training, scaling: Scaling) -> dict[str, ZeroMemory]:
    """DeepSpeed's memory for D and for G."""
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


def find_peak(step: Step, training: Training, scaling: Scaling) -> PeakMemory:
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
            PeakMemory(name, phase, parameters, optimizer, gradients, activations, host)
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
