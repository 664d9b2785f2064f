"""The largest micro-batch that fits a device's memory, which `training.micro_batch: auto` asks for.

`StageMemory` bounds a stage's peak for any micro-batch from steps of two of them. The bound may lie
some per cent above the peak of a divisor of the batch. In addition, no tensor may have more values
than a 32-bit index counts (`Step.most_samples`).

Few samples leave a GPU waiting for Python: at 4 of them an iteration of Kinetics' stage 2 takes the
host longer to launch than a GPU is predicted to compute. Norm statistics are over all samples of a
pass, so more of them are also closer to the paper's, which accumulates nothing.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from engine.batches import accumulation_steps
from engine.configuration import Config, Training, with_training
from engine.errors import UserError
from engine.planning.assumptions import reserve_gb
from engine.planning.meta_step import Step, run_step
from engine.planning.rank_memory import PeakMemory, Scaling, find_peak
from engine.processors import local_processes
from engine.trainer.sample_bank import batches_per_rank

Runner = Callable[[Config, int], Step]


@dataclass
class StageMemory:
    """Peaks of one stage in one way of checkpointing.

    A peak is the largest of many sums, each of which is affine in the micro-batch, so it is convex
    in it: between two micro-batches that were counted, the line through both is an upper bound.
    """

    config: Config
    number: int
    steps: dict[int, Step]
    """By micro-batch, filled as needed."""
    run: Runner = run_step

    def step(self, micro_batch: int) -> Step:
        """Counted, not interpolated."""
        if micro_batch not in self.steps:
            config = with_training(self.config, self.number, micro_batch=micro_batch)
            self.steps[micro_batch] = self.run(config, self.number)
        return self.steps[micro_batch]

    def peak(self, micro_batch: int, scaling: Scaling) -> PeakMemory:
        """The peak of a micro-batch, for which a step is counted."""
        training = self.config.stages[self.number].training
        return find_peak(self.step(micro_batch), training, scaling)

    def bound(self, micro_batch: int, scaling: Scaling) -> int:
        """An upper bound of the peak's total, from the micro-batches that have been counted.

        A larger one, or this one, must have been counted; 1 is counted where no smaller one was.
        """
        if min(self.steps) > micro_batch:
            self.step(1)
        below = max(known for known in self.steps if known <= micro_batch)
        above = min(known for known in self.steps if known >= micro_batch)
        low, high = (self.peak(known, scaling).total for known in (below, above))
        if below == above:
            return low
        return low + -(-(high - low) * (micro_batch - below) // (above - below))

    def largest(
        self,
        share: int,
        scaling: Scaling,
        limit_bytes: float,
        among: Iterable[int] | None = None,
    ) -> int | None:
        """The largest micro-batch that fits and has at most `Step.most_samples`, or None.

        It is looked for `among` some divisors of a rank's share of the batch, the largest first;
        with None, among all of them.
        """
        most_samples = self.step(share).most_samples
        for micro_batch in divisors(share) if among is None else among:
            if micro_batch > most_samples:
                continue
            spread = scaling._replace(accumulates=micro_batch < share)
            if self.bound(micro_batch, spread) <= limit_bytes:
                return micro_batch
        return None


def divisors(number: int) -> Iterator[int]:
    """From the largest on."""
    return (divisor for divisor in range(number, 0, -1) if number % divisor == 0)


def settle_micro_batch(
    config: Config, number: int, *, num_ranks: int, memory_gb: float
) -> tuple[Config, str]:
    """The configuration with a number for "auto", and a line about it.

    `memory_gb` is a device's, in 10^9 bytes, of which `reserve_gb` is left to all but tensors.
    Raises UserError where the batch cannot be shared, or not even one sample fits.
    """
    training = config.stages[number].training
    one = training.model_copy(update={"micro_batch": 1, "reuse_fakes": False})
    share = accumulation_steps(one, num_ranks)
    if training.sample_bank is not None:
        batches_per_rank(training.sample_bank, one, num_ranks)
    memory = StageMemory(config, number, {})
    limit_gb = max(0.0, memory_gb - reserve_gb(memory_gb))
    found = largest_micro_batch(memory, share, num_ranks, limit_gb * 1e9)
    most_samples = memory.step(share).most_samples
    if found is None:
        conditions = [f"{limit_gb:.0f} of {memory_gb:.0f} GB"]
        if most_samples < share:
            conditions.append(f"{most_samples} samples, beyond which 32-bit indices do not reach")
        if training.reuse_fakes:
            conditions.append("reuse_fakes, which takes all of them at once")
        raise UserError(
            f"stages.{number}.training.micro_batch is auto, and of {share} samples per process no "
            f"part suits {', and '.join(conditions)}; engine/plan.py shows what would"
        )
    scaling = Scaling(training.zero_stage, num_ranks, accumulates=found < share)
    peak_gb = memory.bound(found, scaling) / 1e9
    return with_training(config, number, micro_batch=found), (
        f"micro_batch: auto is {found}, of {share} samples per process; planned peak "
        f"{peak_gb:.2g} of {memory_gb:.0f} GB"
        + (f"; 32-bit indices allow {most_samples}" if most_samples < share else "")
    )


def largest_micro_batch(
    memory: StageMemory, share: int, num_ranks: int, limit_bytes: float
) -> int | None:
    """The largest that fits and that the stage's settings allow, or None."""
    training = memory.config.stages[memory.number].training
    if training.acceleration == "cuda_graphs":
        limit_bytes /= 2  # recordings keep what a pass holds, once more at the most
    scaling = Scaling(training.zero_stage, num_ranks, accumulates=False)
    return memory.largest(share, scaling, limit_bytes, _allowed(memory, training, share, num_ranks))


def device_memory_gb(device: torch.device) -> float:
    """All memory of a GPU; for a CPU half of the machine's, shared by the job's processes on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 1e9
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return pages / 2 / local_processes() / 1e9


def _allowed(memory: StageMemory, training: Training, share: int, num_ranks: int) -> Iterable[int]:
    """The divisors of the share that the stage's settings allow, the largest first.

    Fakes that are reused need all of the share. Discriminators that compare samples need two. A
    bank's videos must be whole micro-batches.
    """
    compares = memory.config.stages[memory.number].discriminators.minibatch_stddev
    for micro_batch in divisors(share):
        if training.reuse_fakes and micro_batch < share:
            return
        if compares and micro_batch == 1 < share:
            return
        bank = training.sample_bank
        if bank is None or bank.num_videos % (num_ranks * micro_batch) == 0:
            yield micro_batch
