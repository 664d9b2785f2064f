"""A stage's peak memory for any micro-batch, from steps of two of them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from engine.configuration import Config, with_training
from engine.planning.meta_step import Step, run_step
from engine.planning.peak import Peak, Scaling, find_peak

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

    def peak(self, micro_batch: int, scaling: Scaling) -> Peak:
        """Of a micro-batch that is counted."""
        training = self.config.stages[self.number].training
        return find_peak(self.step(micro_batch), training, scaling)

    def bound(self, micro_batch: int, scaling: Scaling) -> int:
        """The peak's total, at most, from what has been counted; 1 is, where nothing smaller was.

        The largest that was counted must not be smaller than the micro-batch.
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
        """The largest micro-batch that fits, or None, among some of the divisors of a rank's share
        of the batch, from the largest on; None: all of them.

        It has no more samples than `Step.most_samples`.
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
