"""Which metrics a training run evaluates, checked before anything expensive starts."""

from engine.configuration import Config, Training
from engine.errors import UserError
from engine.evaluation.i3d_weights import check_weights, weights_path
from engine.evaluation.metric_definitions import MetricDefinition, find_metrics


def check_evaluation(config: Config, number: int) -> None:
    """UserError where stage `number` could not be evaluated in training: unknown metrics, a network
    without weights, or windows of real clips in the earlier stages' place.
    """
    stage = config.stages[number]
    training = stage.training
    if training.evaluate_every is None:
        return
    metrics = training_metrics(training)
    best = training.evaluation.best
    if best not in [metric.name for metric in metrics]:
        raise UserError(
            f"evaluation.best {best!r} is not measured: evaluation.metrics has "
            f"{', '.join(training.evaluation.metrics)}"
        )
    if number > 1 and not stage.joint and training.condition_on == "data":
        raise UserError(
            "evaluate_every needs the earlier stages, which condition_on=data does without; "
            "use --set training.evaluate_every=null"
        )
    if any(metric.needs_network for metric in metrics):
        check_weights(weights_path())


def training_metrics(training: Training) -> list[MetricDefinition]:
    """Those of `training.evaluation`. Raises UserError for an unknown one."""
    return find_metrics(",".join(training.evaluation.metrics), "evaluation.metrics:")
