"""How long an iteration should take, from counts and stated rates: a prediction, not a measurement.

Computing takes the longer of two times: the FLOPs at a stated fraction of the device's peak, or all
operators' bytes at its memory's full rate. Communication comes after it, and none of it is hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass

from engine.batches import num_generations
from engine.configuration import Training
from engine.planning.assumptions import Gpu
from engine.planning.counters import FROZEN, Update
from engine.planning.meta_step import Step
from engine.planning.rank_memory import Scaling, communicated_bytes, networks_of

LINK_FRACTION = 0.7
"""Of a link's rate that collectives reach. Assumed."""


@dataclass(frozen=True)
class Work:
    """The work for one sample in one iteration: all updates of D and one of G."""

    flops: float
    frozen_flops: float
    """Added by the frozen stages that make the windows."""
    moved_bytes: float
    """Read and written by operators, one by one."""


def work_of(step: Step, training: Training) -> Work:
    """The work of a sample, from a counted step.

    There the frozen stages make something for every window. With a bank they make a whole video,
    but fewer of them.
    """
    times = {"D": training.discriminator_steps, "G": 1}

    def per_sample(count: Callable[[Update], int]) -> float:
        return sum(n * count(step.updates[name]) for name, n in times.items()) / step.micro_batch

    frozen_flops = per_sample(lambda update: update.flops[FROZEN])
    frozen_bytes = per_sample(lambda update: update.moved[FROZEN])
    flops = per_sample(lambda update: update.flops.total()) - frozen_flops
    moved = per_sample(lambda update: update.moved.total()) - frozen_bytes
    part = _made_anew(training)
    return Work(flops, part * frozen_flops, moved + part * frozen_bytes)


def _made_anew(training: Training) -> float:
    """How many videos the frozen stages make per window that is used."""
    bank = training.sample_bank
    if bank is None:
        return 1.0
    windows = num_generations(training) * training.global_batch
    return bank.num_videos / bank.refresh_every / windows


@dataclass(frozen=True)
class Seconds:
    """Per iteration."""

    computing: float
    moving: float
    communicating: float

    @property
    def total(self) -> float:
        """The predicted seconds."""
        return max(self.computing, self.moving) + self.communicating


def predict(
    step: Step,
    training: Training,
    scaling: Scaling,
    device: Gpu,
    *,
    hfu: float,
    num_samples: int,
    num_micro_batches: int,
) -> Seconds:
    """An iteration of `num_samples` on every rank."""
    work = work_of(step, training)
    networks = networks_of(step, training, scaling)
    sent = training.discriminator_steps * communicated_bytes(
        networks["D"], num_micro_batches
    ) + communicated_bytes(networks["G"], num_micro_batches)
    if scaling.zero_stage == 3:  # each network also runs while the other one learns
        passes = {"G": num_generations(training) - 1, "D": 1}
        share = 1 - 1 / scaling.num_ranks
        for name, count in passes.items():
            sent += count * num_micro_batches * networks[name].whole * share
    flops = num_samples * (work.flops + work.frozen_flops)
    return Seconds(
        computing=flops / (hfu * device.tflops(training.precision) * 1e12),
        moving=num_samples * work.moved_bytes / (device.bandwidth_gb_per_second * 1e9),
        communicating=sent / (LINK_FRACTION * device.link_gb_per_second * 1e9),
    )
