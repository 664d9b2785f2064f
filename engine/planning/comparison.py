"""The stages beside DVD-GAN, and both beside what the paper measured (its Table 3)."""

from dataclasses import dataclass

from engine.configuration import Config, with_training
from engine.planning.assumptions import Assumptions
from engine.planning.paper import MODELS_OF_TABLE_3, TABLE_3, MeasuredInPaper
from engine.planning.rank_memory import Scaling
from engine.planning.step_time import predict
from engine.planning.training_plan import Planner


@dataclass(frozen=True)
class ComparedModel:
    """The cost of one model at as many samples per GPU as the paper had, all in one pass."""

    name: str
    stage: int
    resolution: int
    num_frames: int
    samples_per_gpu: int
    memory_mb: float
    """Predicted."""
    seconds_per_iteration: float
    """Predicted, of these samples."""
    paper: MeasuredInPaper | None

    @property
    def seconds_per_sample(self) -> float:
        """Seconds of one GPU per sample."""
        return self.seconds_per_iteration / self.samples_per_gpu


def compare(
    planner: Planner, assumptions: Assumptions, config: Config, dvdgan: Config, precision: str
) -> list[ComparedModel]:
    """All stages of a configuration, then DVD-GAN, each trained as its file says.

    Only the precision is the same for all: that of the stage that is planned.
    """
    compared = []
    for model in (config, dvdgan):
        numbers = list(model.stages)
        for number in numbers:
            model = with_training(model, number, precision=precision)
        compared += [_compared(planner, assumptions, model, number) for number in numbers]
    return compared


def _compared(planner: Planner, assumed: Assumptions, config: Config, number: int) -> ComparedModel:
    stage = config.stages[number]
    # Of Kinetics-600: other data sets' networks have such sizes too, but not such costs.
    measured = config.name in MODELS_OF_TABLE_3
    paper = TABLE_3.get((stage.resolution, stage.num_frames)) if measured else None
    if paper is None:
        asked = stage.training.micro_batch
        samples = (planner.largest(config, number) or 1) if asked == "auto" else asked
        config = with_training(config, number, micro_batch=samples)
    else:
        samples = paper.samples_per_gpu
        config = with_training(config, number, micro_batch=samples, sample_bank=None)
    memory = planner.memory(config, number)
    training = config.stages[number].training
    scaling = Scaling(training.zero_stage, assumed.num_gpus, accumulates=False)
    seconds = predict(
        memory.step(samples),
        training,
        scaling,
        assumed.device,
        hfu=assumed.hfu,
        num_samples=samples,
        num_micro_batches=1,
    )
    return ComparedModel(
        name=config.name,
        stage=number,
        resolution=stage.resolution,
        num_frames=stage.num_frames,
        samples_per_gpu=samples,
        memory_mb=memory.peak(samples, scaling).total / 1e6,
        seconds_per_iteration=seconds.total,
        paper=paper,
    )
