"""The evaluation that a training run makes of its generator every `training.evaluate_every`.

It is the cheap form of engine/evaluate.py: no intervals, few clips, and of the controls real clips
against other real ones, once. What it measures is what a user gets: whole clips with fixed norm
statistics, and averaged weights where the run keeps an average. The same latents and classes are
drawn every time, so that values differ by what was learned. Nothing of the training changes.

All ranks make clips and features; rank 0 compares them.

Shapes: N clips, F features of a layer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.configuration import Config
from engine.dummy_passes import choose_passes, clip_length, load_trained, run_passes
from engine.errors import UserError
from engine.evaluation.clips import View, choose_clips
from engine.evaluation.feature_networks import FeatureNetwork, I3DNetwork
from engine.evaluation.features import Features, extract, features_of_clips, merge
from engine.evaluation.i3d_weights import weights_path
from engine.evaluation.protocol import EvaluationProtocol
from engine.evaluation.training_metrics import training_metrics
from engine.evaluation.video_sources import IndexedVideos
from engine.sampled_dataset import draw_labels
from engine.sampling import SamplePlan, stream
from engine.trainer.checkpoint_meta import Evaluated
from engine.trainer.checkpoints import PREVIOUS, read_tensors
from engine.trainer.deepspeed_engines import whole_state
from engine.trainer.networks import StageBuilder
from engine.trainer.run_state import generators_for_use
from engine.trainer.step import Trainer
from engine.video.index import VideoIndex

_EVALUATION = "evaluation"  # a stream of random numbers


class _StoppedError(Exception):
    """The run was asked to end."""


@dataclass(frozen=True)
class _Running:
    """A run's generator as it is now; a `TrainedCascade`."""

    path: Path
    step: int
    stage_number: int
    classes: list[str]
    class_counts: list[int]
    frames_per_second: float
    settings: Config
    states: dict[int, dict[str, Tensor]]
    digest: str = ""
    passes: None = None

    def config(self) -> Config:
        """See `TrainedCascade`."""
        return self.settings

    def generators(self) -> dict[int, dict[str, Tensor]]:
        """See `TrainedCascade`."""
        return self.states


class TrainingEvaluation:
    """Features of real clips, and how a stage's generator is compared with them."""

    def __init__(self, builder: StageBuilder, index: VideoIndex, folder: Path) -> None:
        """Extract the real clips' features into `folder`, a stage's. Collective.

        Raises UserError where there are too few real videos of the length.
        """
        self._builder, self._folder = builder, folder
        stage = builder.config.stages[builder.number]
        settings = stage.training.evaluation
        self._metrics, self._best = training_metrics(stage.training), settings.best
        self._network: FeatureNetwork | None = None
        named = {"network": "none", "network_sha256": ""}
        if any(metric.needs_network for metric in self._metrics):
            self._network = I3DNetwork.load(weights_path(), builder.ranks.device)
            named = {"network": self._network.name, "network_sha256": self._network.sha256}
        self._protocol = EvaluationProtocol(
            name="training",
            resolution=stage.resolution,
            num_frames=min(settings.num_frames, clip_length(self._now(0, {}))),
            real_stride=stage.frame_stride,
            short="drop",
            few_frames="loop",
            num_videos=settings.num_videos,
            inception_splits=1,
            **named,  # type: ignore[arg-type]
        )
        reals = choose_clips(IndexedVideos(index), "real", self._protocol, 2 * settings.num_videos)
        self.num_clips = len(reals.clips) // 2
        if self.num_clips < 2:
            raise UserError(
                f"evaluate_every needs four videos that span "
                f"{self._protocol.source_frames('real')} frames, and there are {len(reals.clips)}; "
                "use --set training.evaluate_every=null"
            )
        plain: View = "plain"
        used, cache = range(2 * self.num_clips), folder / "features"
        given = reals, used, plain, self._protocol, self._network, cache
        ranks = builder.ranks
        extract(*given, rank=ranks.rank, world_size=ranks.world_size)
        ranks.barrier()
        found = merge(*given)
        others, self._reals = (
            {name: rows[part] for name, rows in found.items()}
            for part in (slice(self.num_clips, None), slice(self.num_clips))
        )
        self._of_real = self._values(others)

    def line(self) -> str:
        """What is measured, for the console."""
        shown = ", ".join(f"{name} {value:.4g}" for name, value in self._of_real.items())
        return (
            f"evaluation: {self.num_clips} clips of {self._protocol.num_frames} frames; of other "
            f"real ones: {shown}"
        )

    def measure(self, trainer: Trainer, goes_on: Callable[[], bool]) -> Evaluated | None:
        """See `engine.trainer.stage_run.StageEvaluation`.

        Raises UserError where what the generator makes is not finite.
        """
        generated = self._features(trainer, goes_on)
        if generated is None or not self._builder.ranks.is_main:
            return None
        found = self._values(generated)
        best = next(metric for metric in self._metrics if metric.name == self._best)
        badness = best.badness(found[best.name])
        fingerprint = self._protocol.fingerprint()
        return Evaluated(
            measured=found,
            of_real=self._of_real,
            metric=best.name,
            badness=badness,
            protocol=fingerprint,
        )

    def _values(self, candidate: Features) -> dict[str, float]:
        try:
            return {
                metric.name: metric.value(self._reals, candidate, self._protocol)
                for metric in self._metrics
            }
        except ValueError as error:
            raise UserError(f"training.evaluation: {error}") from None

    def _features(self, trainer: Trainer, goes_on: Callable[[], bool]) -> Features | None:
        """Of generated clips, every rank's share gathered."""
        builder, ranks = self._builder, self._builder.ranks
        running = self._now(trainer.step, self._states(trainer))
        cascade = load_trained(running, ranks.device)
        seed = builder.seed(_EVALUATION)
        settings = builder.config.stages[builder.number].training.evaluation
        passes = choose_passes(
            running,
            num_frames=self._protocol.num_frames,
            sigma=1.0,
            seed=seed,
            num_passes=settings.norm_statistics_passes,
        )
        run_passes(cascade, running, passes)
        # As many on every rank, since all of them ask together whether to go on.
        each = -(-self.num_clips // ranks.world_size)
        plan = SamplePlan(
            running,
            draw_labels(running, each * ranks.world_size, seed),
            self._protocol.num_frames,
            1.0,
            seed,
            passes,
        )
        mine = range(ranks.rank * each, (ranks.rank + 1) * each)

        def clips() -> Iterator[NDArray[np.uint8]]:
            for chunks in stream(cascade, plan, numbers=mine):
                if not goes_on():
                    raise _StoppedError
                yield torch.cat(list(chunks)).permute(0, 2, 3, 1).numpy()

        try:
            found = features_of_clips(clips(), self._protocol, self._network)
        except _StoppedError:
            return None
        parts = ranks.gather(found)
        return {
            name: np.concatenate([part[name] for part in parts])[: self.num_clips] for name in found
        }

    def _states(self, trainer: Trainer) -> dict[int, dict[str, Tensor]]:
        builder = self._builder
        zero_stage = builder.config.stages[builder.number].training.zero_stage
        weights = whole_state(trainer.g_engine.module, zero_stage=zero_stage, keep=True)
        average = trainer.average.state_dict() if trainer.average else None
        trained = generators_for_use(trainer, weights, average)
        if builder.previous is None:
            return trained
        return read_tensors(self._folder / PREVIOUS)["generators"] | trained

    def _now(self, step: int, states: dict[int, dict[str, Tensor]]) -> _Running:
        builder, facts = self._builder, self._builder.facts
        return _Running(
            self._folder,
            step,
            builder.number,
            list(facts.classes),
            list(facts.class_counts),
            builder.frames_per_second,
            builder.config,
            states,
        )
