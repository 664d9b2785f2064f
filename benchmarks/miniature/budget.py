"""Equal cost for every model: FLOPs of an iteration, counted, and the iterations that follow.

Time is not measured: the same minutes give the same iterations on every machine, and the same
results where arithmetic is the same. How long they take there is another matter.
"""

from dataclasses import dataclass

from benchmarks.miniature.models import FULL, MODELS, Model, configuration
from engine.configuration import Config

MINUTES = 40.0
"""Per seed, on a core of its own."""
OVERHEAD_MINUTES = 5.0
"""Of them for starting eight processes, fixing norms' statistics, checkpoints and measuring."""
SUSTAINED_GFLOPS = 35.0
"""GFLOP/s of training on one core that others use too. Alone on one (an EPYC's, where a matrix
product reaches 55 to 60), stage 1 reached 47, DVD-GAN 55 and stage 2 56 to 58."""
STAGE_1_SHARE = 0.4
"""Of a two-stage model's budget: about what configs/sample.yaml gives it."""
STAGE_1 = "stage 1"


@dataclass(frozen=True)
class Budget:
    """Training FLOPs that stage 1 and stage 2 may take; a model that trains both has the sum."""

    stage_1: float
    stage_2: float

    def of(self, name: str) -> float:
        """What a model may take, or the shared stage 1."""
        if name == STAGE_1:
            return self.stage_1
        shares = {model.name: model.shares_stage_1 for model in MODELS}[name]
        return self.stage_2 if shares else self.stage_1 + self.stage_2


def budget_for(minutes: float) -> Budget:
    """What so many minutes per seed come to, for the shared stage 1 and all models together."""
    seconds = max(minutes - OVERHEAD_MINUTES, 0) * 60
    num_shared = sum(model.shares_stage_1 for model in MODELS)
    num_whole = len(MODELS) - num_shared
    # Every model is a whole one or a stage 2; the shared ones have one stage 1 together.
    num_models = num_whole + (1 - STAGE_1_SHARE) * num_shared + STAGE_1_SHARE
    of_model = seconds * SUSTAINED_GFLOPS * 1e9 / num_models
    return Budget(STAGE_1_SHARE * of_model, (1 - STAGE_1_SHARE) * of_model)


def iteration_flops(config: Config, number: int) -> float:
    """Of all D updates and the G update of a global batch, frozen stages' windows included.

    Counted with the operators' forms for CPUs: convolutions and matrix products, as executed.
    """
    # Imported late: they bring DeepSpeed, and every job reads this module's constants.
    from engine.planning.meta_step import run_step
    from engine.planning.step_time import work_of

    training = config.stages[number].training
    work = work_of(run_step(config, number, implementations="cpu"), training)
    return training.global_batch * (work.flops + work.frozen_flops)


def count() -> dict[str, float]:
    """`iteration_flops` of stage 1 and of every model, by name."""

    def counted(model: Model, number: int) -> float:
        return iteration_flops(configuration(model), number)

    flops = {STAGE_1: counted(FULL, 1)}
    return flops | {model.name: counted(model, model.stage_number) for model in MODELS}


def iterations_of(flops: dict[str, float], budget: Budget) -> dict[str, int]:
    """As many as the budget allows, by name; one at least."""
    return {name: max(1, int(budget.of(name) // each)) for name, each in flops.items()}
