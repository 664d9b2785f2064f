"""What a checkpoint or an exported cascade generates, as a source of videos to evaluate.

Videos are written once, exact, into a folder that is named after everything that they depend on. So
an evaluation that was stopped goes on, and one with other metrics finds them there.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

from engine.command_line import REPOSITORY
from engine.dummy_passes import TrainedCascade, choose_passes, clip_length
from engine.evaluation.protocol import EvaluationProtocol
from engine.sampled_dataset import CLIPS, complete_dataset, draw_labels
from engine.sampling import SamplePlan
from engine.trainer.ranks import Ranks

GENERATED = REPOSITORY / "data" / "generated"
SIGMA = 1.0
"""Unit variance: the paper's for metrics."""


def protocol_changes(trained: TrainedCascade, asked: Sequence[str]) -> list[str]:
    """KEY=VALUE for what the cascade tells of a protocol, unless it is asked for: the videos' size,
    and the stride over source frames that real videos are seen with in training."""
    stage = trained.config().stages[trained.stage_number]
    told = {"resolution": stage.resolution, "real_stride": stage.frame_stride}
    given = {change.partition("=")[0] for change in asked}
    return [f"{key}={value}" for key, value in told.items() if key not in given]


def generated_videos(
    trained: TrainedCascade,
    protocol: EvaluationProtocol,
    num: int,
    *,
    seed: int,
    folder: Path | None,
    ranks: Ranks,
) -> Path:
    """The folder of `num` videos, classes as often as the training data has them. Collective.

    They are as long as the unrolled training clip, or as the protocol's clips where these are
    longer. Raises UserError where the folder holds something else, or cannot be written.
    """
    num_frames = max(clip_length(trained), protocol.source_frames("generated"))
    passes = choose_passes(trained, num_frames=num_frames, sigma=SIGMA, seed=seed)
    labels = draw_labels(trained, num, seed)
    plan = SamplePlan(trained, labels, num_frames, SIGMA, seed, passes)
    if folder is None:
        told = repr((trained.digest, num, num_frames, SIGMA, seed, astuple(passes)))
        folder = GENERATED / hashlib.sha256(told.encode()).hexdigest()[:16]
    complete_dataset(folder, plan, "png", ranks)
    return folder / CLIPS
