"""Evaluate the trained models as `engine/evaluate.py` would: FVD, KVD, IS and the like.

What `measuring.py` measures is made for these clips; this is what the field reports. Of every model
the same clips, fewer than are measured, because I3D takes about a second for each. Features are
kept in OUT/features, so what was interrupted goes on.

Shapes: N clips, T frames, H x W pixels, C = 3 (RGB), uint8.
"""

from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.miniature.measured import (
    EVALUATION,
    FROZEN,
    OTHER_HALF,
    SHUFFLED,
    EvaluatedModel,
    read_evaluated,
)
from benchmarks.miniature.measuring import RealClips, make_clips
from benchmarks.miniature.models import MODELS, NUM_FRAMES, Model, folder_of
from benchmarks.miniature.plan import MiniaturePlan
from benchmarks.miniature.ranking import BySeed, ModelResult
from benchmarks.miniature.verdicts import Results
from engine.durable_files import write_json
from engine.evaluation.controls import blind_to
from engine.evaluation.evaluation import Evaluation, evaluate
from engine.evaluation.feature_networks import FeatureNetwork, I3DNetwork
from engine.evaluation.i3d_weights import weights_path
from engine.evaluation.metric_definitions import find_metrics
from engine.evaluation.protocol import EvaluationProtocol, find_protocol
from engine.evaluation.video_sources import ArchivedVideos, VideoSource
from engine.models.construction import forbid_tf32
from engine.trainer.checkpoints import find_checkpoint
from engine.video.writing import to_uint8

METRICS = "fvd,kvd,is-k400,precision,recall,coverage,motion"
FEATURES = "features"
NO_WEIGHTS = "no I3D weights (`make i3d`): FVD, KVD, IS and what they rank are left out"


def protocol_of(plan: MiniaturePlan, num_classes: int) -> EvaluationProtocol:
    """Of clips as they are generated, as many real ones, and one split for the IS of so few."""
    changes = {
        "num_frames": NUM_FRAMES,
        "num_videos": num_classes * plan.settings.evaluated_per_class,
        "inception_splits": 1,
    }
    return find_protocol("original-fvd", [f"{key}={value}" for key, value in changes.items()])


def evaluate_models(plan: MiniaturePlan, seeds: list[int], say: Callable[[str], None]) -> None:
    """Write OUT/seed-S/MODEL/evaluation.json of every model that has none, if there is a network.

    Raises UserError where the network's weights are damaged.
    """
    missing = [
        (seed, model)
        for seed in seeds
        for model in MODELS
        if read_evaluated(plan.out, seed, model.name) is None
    ]
    if not missing:
        return
    if not weights_path().is_file():
        say(NO_WEIGHTS)
        return
    forbid_tf32()
    network = I3DNetwork.load(weights_path(), torch.device("cpu"))
    seed, model = missing[0]
    names = find_checkpoint(folder_of(plan.out, seed, model.name)).classes
    clips = RealClips(plan, names)
    real = _source("real clips", torch.cat([half.video_BTCHW for half in clips.halves()]))
    for number, (seed, model) in enumerate(missing, start=1):
        say(f"seed {seed}: evaluation {number} of {len(missing)}: {model.title}")
        _evaluate_model(plan, seed, model, real, clips.classes, network)


def with_evaluations(plan: MiniaturePlan, results: Results) -> BySeed | None:
    """The results, each with what its evaluation found; None unless all were evaluated."""
    found: dict[int, dict[str, ModelResult]] = {}
    for seed, models in results.items():
        found[seed] = {}
        for name, measured in models.items():
            evaluated = read_evaluated(plan.out, seed, name)
            if evaluated is None:
                return None
            found[seed][name] = ModelResult(measured, evaluated)
    return found


def _evaluate_model(
    plan: MiniaturePlan,
    seed: int,
    model: Model,
    real: VideoSource,
    classes: list[int],
    network: FeatureNetwork,
) -> None:
    folder, settings = folder_of(plan.out, seed, model.name), plan.settings
    made = make_clips(folder, classes, settings.evaluated_per_class, settings.passes)
    found = evaluate(
        real,
        _source(str(folder), made.clips.video_BTCHW),
        protocol_of(plan, len(classes)),
        find_metrics(METRICS),
        network,
        plan.out / FEATURES,
    )
    write_json(folder / EVALUATION, asdict(_evaluated(found)))


def _evaluated(found: Evaluation) -> EvaluatedModel:
    values, intervals, controls, blind = {}, {}, {}, {}
    for row in found.rows:
        assert row.measurement is not None, row.note
        assert row.controls is not None, row.note
        name, interval = row.metric.name, row.measurement.interval
        values[name] = row.measurement.value
        intervals[name] = [interval.low, interval.high]
        controls[name] = {
            OTHER_HALF: row.controls.real.value,
            SHUFFLED: row.controls.shuffled.value,
            FROZEN: row.controls.frozen.value,
        }
        blind[name] = blind_to(row.metric, row.controls)
    return EvaluatedModel(found.protocol.to_tree(), values, intervals, controls, blind)


def _source(path: str, video_BTCHW: Tensor) -> VideoSource:
    videos_NTHWC: NDArray[np.uint8] = to_uint8(video_BTCHW).permute(0, 1, 3, 4, 2).numpy()
    return ArchivedVideos(path, np.ascontiguousarray(videos_NTHWC))
