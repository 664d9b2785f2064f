"""The whole plan of a stage: what `engine/plan.py` prints."""

from collections.abc import Callable
from dataclasses import dataclass

from engine.configuration import Config, with_training
from engine.models.activation_checkpointing import Checkpointing
from engine.planning.assumptions import Assumptions, checked, share_of
from engine.planning.meta_step import Step, run_step
from engine.planning.micro_batch import StageMemory, largest_micro_batch
from engine.planning.rank_memory import ZERO_STAGES, PeakMemory, Scaling
from engine.planning.step_time import Seconds, Work, predict, work_of

MODES: tuple[Checkpointing, ...] = ("none", "norms", "blocks")
SECONDS_PER_DAY = 86_400


@dataclass(frozen=True)
class Largest:
    """The largest micro-batch that fits."""

    micro_batch: int
    accumulation: int
    peak_bytes: int
    """At most."""
    seconds: Seconds
    days: float
    """For all of training.iterations."""


@dataclass(frozen=True)
class PlanRow:
    """One way to train the stage."""

    zero_stage: int
    checkpointing: str
    peak: PeakMemory
    """At the configured micro-batch."""
    fits: bool
    largest: Largest | None


@dataclass(frozen=True)
class TrainingPlan:
    """The plan of one stage on some GPUs."""

    config: Config
    number: int
    assumptions: Assumptions
    share: int
    """Samples of a GPU per update."""
    chosen_by: str
    """Words on who chose the micro-batch; empty where the configuration says it."""
    most_samples: int
    """In one pass, so that no tensor has more values than 32 bits count."""
    generator_parameters: int
    discriminator_parameters: int
    work: dict[str, Work]
    """Of a sample and iteration, by way of checkpointing."""
    rows: list[PlanRow]


Say = Callable[[str], None]


class Planner:
    """Counts steps once and makes plans of them; `say` is told what is being counted."""

    def __init__(self, assumptions: Assumptions, say: Say) -> None:
        self._assumptions, self._say = assumptions, say
        self._steps: dict[tuple[str, int], Step] = {}

    def plan(self, config: Config, number: int) -> TrainingPlan:
        """Every ZeRO stage and way of checkpointing. Raises UserError."""
        config = checked(config, number, self._assumptions)
        asked = config.stages[number].training.micro_batch
        found = self.largest(config, number) if asked == "auto" else asked
        chosen_by = "" if asked != "auto" else " (auto)" if found else " (auto: none is possible)"
        config = with_training(config, number, micro_batch=found or 1)
        training = config.stages[number].training
        share = share_of(config, number, self._assumptions.num_gpus)
        memories = {
            mode: self.memory(with_training(config, number, checkpointing=mode), number)
            for mode in MODES
        }
        for memory in memories.values():
            for micro_batch in sorted({training.samples_per_pass, share}):
                memory.step(micro_batch)
        counted = memories["norms"].step(share)
        return TrainingPlan(
            config=config,
            number=number,
            assumptions=self._assumptions,
            share=share,
            chosen_by=chosen_by,
            most_samples=counted.most_samples,
            generator_parameters=sum(counted.generator_sizes),
            discriminator_parameters=sum(counted.discriminator_sizes),
            work={mode: work_of(memory.step(share), training) for mode, memory in memories.items()},
            rows=[
                self._row(memory, mode, zero_stage, share)
                for zero_stage in ZERO_STAGES
                for mode, memory in memories.items()
            ],
        )

    def largest(self, config: Config, number: int) -> int | None:
        """The number that train.py takes for `micro_batch: auto`; None where it refuses."""
        assumed = self._assumptions
        share = share_of(config, number, assumed.num_gpus)
        return largest_micro_batch(
            self.memory(config, number), share, assumed.num_gpus, assumed.limit_bytes
        )

    def memory(self, config: Config, number: int) -> StageMemory:
        """The memory of a stage, for which steps are counted as they are needed."""

        def run(config: Config, number: int) -> Step:
            key = config.model_dump_json(), number
            if key not in self._steps:
                training = config.stages[number].training
                self._say(
                    f"counting a step of {config.name}, stage {number}: checkpointing "
                    f"{training.checkpointing}, micro-batch {training.samples_per_pass}"
                )
                self._steps[key] = run_step(config, number)
            return self._steps[key]

        return StageMemory(config, number, {}, run)

    def _row(self, memory: StageMemory, mode: str, zero_stage: int, share: int) -> PlanRow:
        assumed, training = self._assumptions, memory.config.stages[memory.number].training
        micro_batch = training.samples_per_pass
        scaling = Scaling(zero_stage, assumed.num_gpus, micro_batch < share)
        peak = memory.peak(micro_batch, scaling)
        fits = peak.total <= assumed.limit_bytes
        found = memory.largest(share, scaling, assumed.limit_bytes)
        # Reused fakes cannot be accumulated.
        if found is None or (training.reuse_fakes and found < share):
            return PlanRow(zero_stage, mode, peak, fits, None)
        scaling = scaling._replace(accumulates=found < share)
        seconds = predict(
            memory.step(share),
            training,
            scaling,
            assumed.device,
            hfu=assumed.hfu,
            num_samples=share,
            num_micro_batches=share // found,
        )
        largest = Largest(
            micro_batch=found,
            accumulation=share // found,
            peak_bytes=memory.bound(found, scaling),
            seconds=seconds,
            days=seconds.total * training.iterations / SECONDS_PER_DAY,
        )
        return PlanRow(zero_stage, mode, peak, fits, largest)
