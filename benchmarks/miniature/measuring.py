"""Measure the trained models of one seed: `python -m benchmarks.miniature.measuring`.

Of every model the same clips: made as engine/sample.py makes them, at the unrolled length, from the
same z. Beside them real clips, one half compared with the other. What is measured already, is not
measured again.

Shapes: B clips, T frames, t frames of x_l, C channels, H x W and h x w pixels; in [-1, 1].
"""

from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.miniature.measured import (
    FIGURES,
    FRAMES,
    FROZEN,
    OTHER_HALF,
    REAL,
    SHUFFLED,
    STRIP,
    ClipFigures,
    read_measured,
)
from benchmarks.miniature.models import MODELS, NUM_FRAMES, PERIOD, WINDOWS, Model, folder_of
from benchmarks.miniature.plan import MiniaturePlan, read_plan
from engine.clip_figures import LEVEL, Recogniser, compare, measure, motion_ratio
from engine.command_line import ArgumentParser, run
from engine.dummy_passes import DummyPasses, load_trained, run_passes
from engine.durable_files import PARTIAL, put_in_place, write_json, writing
from engine.evaluation.classifier import VIEWS, train_classifier
from engine.evaluation.grounding import grounding
from engine.evaluation.real_clips import (
    ClipShape,
    LabelledClips,
    find_real_videos,
    reference_halves,
    training_clips,
)
from engine.evaluation.report import spoilt
from engine.evaluation.spectra import frames_looked_at, spectra, spectral_distances
from engine.models.construction import forbid_tf32
from engine.sampling import SamplePlan, generate
from engine.trainer.checkpoints import find_checkpoint
from engine.video.writing import to_uint8

_NUM_SHOWN = 8
"""Frames in a strip."""
_SEED, _BATCH = 0, 8  # the same clips of all models and of all seeds of training
_STILL = LEVEL / 100
"""What a mean step counts for at least, so that ratios are finite and their logarithms too."""
_DEVICE = torch.device("cpu")


class Clips(NamedTuple):
    """Generated clips, and the x_l that they were made of."""

    clips: LabelledClips
    low_BtChw: Tensor | None
    """Rounded to 8 bits, as the clips are."""


class RealClips:
    """Real clips like those that are generated: two halves to compare, others to learn from."""

    def __init__(self, plan: MiniaturePlan, names: list[str]) -> None:
        self._config = plan.data_config
        stage = self._config.stages[2]
        self._shape = ClipShape(NUM_FRAMES, stage.frame_stride, stage.resolution)
        self._videos = find_real_videos(
            self._config,
            names,
            num_source_frames=self._shape.num_source_frames,
            num_per_class=plan.settings.clips_per_class,
            held_out_path=None,
            seed=_SEED,
            say=print,
        )
        self.classes = self._videos.classes

    def halves(self) -> tuple[LabelledClips, LabelledClips]:
        """As many of each class in both; those to compare with come first."""
        return reference_halves(self._videos, self._config, self._shape, _DEVICE, _SEED)

    def to_learn_from(self) -> tuple[Tensor, Tensor]:
        """Clips and labels for classifiers."""
        return training_clips(self._videos, self._config, self._shape, _DEVICE, _SEED)


class Judge:
    """Real clips and the classifiers trained on others."""

    def __init__(self, clips: RealClips) -> None:
        self.classes = clips.classes
        self.real, self.other_half = clips.halves()
        seen_BTCHW, labels_B = clips.to_learn_from()
        self._recognisers: dict[str, Recogniser] = {
            name: train_classifier(seen_BTCHW, labels_B, view, seed=_SEED)
            for name, view in VIEWS.items()
        }
        self._figures = measure(*self.real, period=PERIOD, recognisers=self._recognisers)
        self._spectra = spectra(self.real.video_BTCHW, FRAMES)

    def measure(self, clips: LabelledClips) -> ClipFigures:
        """All but grounding."""
        video_BTCHW, real_BTCHW = clips.video_BTCHW, self.real.video_BTCHW
        figures = measure(*clips, period=PERIOD, recognisers=self._recognisers)
        ratios = compare(figures, self._figures)
        spectra_KR = spectra(video_BTCHW, FRAMES)
        return ClipFigures(
            num_clips=len(video_BTCHW),
            motion=ratios.motion,
            ends=figures.ends and list(figures.ends),
            judder=figures.judder,
            persistence=figures.persistence,
            recognised=figures.recognised,
            variety=ratios.variety,
            grounding=None,
            grounding_of_others=None,
            moves_within=[
                motion_ratio(
                    _motion_within(video_BTCHW, window), _motion_within(real_BTCHW, window)
                )
                for window in WINDOWS
            ],
            fading=[fading(video_BTCHW, window) for window in WINDOWS],
            spectra=spectra_KR.tolist(),
            spectral_distances=spectral_distances(spectra_KR, self._spectra),
        )


def fading(video_BTCHW: Tensor, window: int) -> float:
    """Motion after the first `window` frames as part of that in them; 1 in both where it is even.

    Mean |x[t+1] - x[t]| over all steps of each part, not over the middle half: few steps are left
    after the window. Catches a recurrent state that comes to rest beyond the length that it was
    trained on (the paper's Figure 3).
    """
    after = _mean_step(video_BTCHW[:, window - 1 :])
    return max(after, _STILL) / max(_motion_within(video_BTCHW, window), _STILL)


def _motion_within(video_BTCHW: Tensor, window: int) -> float:
    return _mean_step(video_BTCHW[:, :window])


def _mean_step(video_BTCHW: Tensor) -> float:
    return video_BTCHW.diff(dim=1).abs().mean().item()


def make_clips(folder: Path, classes: list[int], clips_per_class: int, passes: int) -> Clips:
    """What engine/sample.py would write of the newest checkpoint, before it is encoded.

    x_l is what the stage before the last makes of it meanwhile.
    """
    checkpoint = find_checkpoint(folder)
    labels = classes * clips_per_class
    plan = SamplePlan(
        checkpoint=checkpoint,
        labels=list(labels),
        num_frames=NUM_FRAMES,
        sigma=1.0,  # the paper's for metrics
        seed=_SEED,
        passes=DummyPasses(NUM_FRAMES, passes, _BATCH, sigma=1.0, seed=_SEED),
    )
    cascade = load_trained(checkpoint, _DEVICE)
    run_passes(cascade, checkpoint, plan.passes)
    lows: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
        lows.append(to_uint8(output))

    for before in cascade.generators[-2:-1]:
        before.register_forward_hook(keep)
    progress = tqdm(generate(cascade, plan), "generating", total=len(labels), unit="clip")
    video_BTCHW = _as_floats(torch.stack(list(progress)))
    clips = LabelledClips(video_BTCHW, torch.tensor(labels))
    return Clips(clips, _as_floats(torch.cat(lows)) if lows else None)


def _as_floats(video_BTCHW: Tensor) -> Tensor:
    """What a loader makes of uint8."""
    return video_BTCHW.float().div_(127.5).sub_(1)


def measure_model(judge: Judge, plan: MiniaturePlan, seed: int, model: Model) -> None:
    """Write a model's figures, and a strip of its first clip."""
    folder, settings = folder_of(plan.out, seed, model.name), plan.settings
    made = make_clips(folder, judge.classes, settings.clips_per_class, settings.passes)
    tree = asdict(judge.measure(made.clips))
    if made.low_BtChw is not None:
        others_BtChw = made.low_BtChw.roll(len(judge.classes), dims=0)
        video_BTCHW = made.clips.video_BTCHW
        tree["grounding"] = grounding(video_BTCHW, made.low_BtChw, PERIOD)
        tree["grounding_of_others"] = grounding(video_BTCHW, others_BtChw, PERIOD)
    write_strip(folder / STRIP, made.clips.video_BTCHW[0])
    write_json(folder / FIGURES, tree)  # last: it says that all is there


def measure_real(judge: Judge, plan: MiniaturePlan, seed: int) -> None:
    """Write what the figures are of real clips: those compared with, others, and these spoilt."""
    damaged = dict(spoilt(judge.other_half, PERIOD, _SEED))
    for name, clips in (
        (OTHER_HALF, judge.other_half),
        (SHUFFLED, damaged["frames shuffled"]),
        (FROZEN, damaged["first frame frozen"]),
        (REAL, judge.real),
    ):
        folder = folder_of(plan.out, seed, name)
        folder.mkdir(parents=True, exist_ok=True)
        write_strip(folder / STRIP, clips.video_BTCHW[0])
        write_json(folder / FIGURES, asdict(judge.measure(clips)))


def write_strip(path: Path, video_TCHW: Tensor) -> None:
    """A PNG of evenly spaced frames, side by side."""
    shown = frames_looked_at(len(video_TCHW), _NUM_SHOWN)
    strip_HNC = torch.cat(list(to_uint8(video_TCHW[shown])), dim=-1).permute(1, 2, 0)
    partial = path.with_name(path.name + PARTIAL)
    with writing(path):
        Image.fromarray(strip_HNC.numpy()).save(partial, format="PNG")
        put_in_place(partial, path)


def main(arguments: list[str]) -> None:
    """Measure what is trained and not measured."""
    parser = ArgumentParser(__doc__ or "")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="with plan.json")
    parser.add_argument("--seed", type=int, required=True, help="of the training")
    options = parser.parse_args(arguments)
    plan = read_plan(options.out)
    forbid_tf32()
    missing = [m for m in MODELS if read_measured(plan.out, options.seed, m.name) is None]
    names = find_checkpoint(folder_of(plan.out, options.seed, MODELS[0].name)).classes
    judge = Judge(RealClips(plan, names))
    measure_real(judge, plan, options.seed)
    for model in missing:
        print(f"measuring: {model.title}", flush=True)
        measure_model(judge, plan, options.seed, model)


if __name__ == "__main__":
    run(main)
