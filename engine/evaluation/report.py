"""The report on a checkpoint: clips as engine/sample.py makes them, beside real and spoilt ones.

The same table judges the figures themselves: real clips pass all of them, and for each figure there
is a row of clips that are spoilt so that they fail it.

Shapes: B clips, T frames, C channels, H x W pixels; [B, T, C, H, W] with values in [-1, 1].
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from engine.clip_figures import Figures, Ratios, Recogniser, compare, measure
from engine.dummy_passes import TrainedCascade, choose_passes, load_trained
from engine.errors import UserError
from engine.evaluation.classifier import VIEWS, train_classifier
from engine.evaluation.real_clips import (
    ClipShape,
    LabelledClips,
    RealVideos,
    find_real_videos,
    reference_halves,
    training_clips,
)
from engine.evaluation.spectra import frames_looked_at, spectra, spectral_distances
from engine.exported import fix_norms
from engine.models.construction import forbid_tf32
from engine.sampling import SamplePlan, generate
from engine.trainer.ranks import derived_seed

_SHUFFLES = "shuffled frames"  # a stream of random numbers
_DEFAULT_NUM, _DEFAULT_NUM_UNLABELLED = 8, 64
_LEAST_FRAMES = 3
_NUM_EXAMPLE_ROWS = 2
COARSE_PIXELS = 16
"""Of the control for detail; what has no more pixels has no such control."""
_LEGEND = [
    "motion, variety: over real clips' (variety of the least various class in brackets)",
    "at start, end: motion there over motion in the middle; judder: 1 is even",
    "persistence: 2 is steady, 1 and less flickers; PSD: distance of log10 spectra from real ones'",
    "by colour, by motion: share of clips in which a classifier of real ones sees their class",
]


@dataclass(frozen=True)
class ReportOptions:
    """What a report is made of; the same options and files give the same figures on a CPU."""

    data: str | None = None
    """Training data, by index or folder; None: where the checkpoint's configuration has it."""
    held_out: str | None = None
    """Real videos that were not trained on; None: the sample set's own, or the training data."""
    num: int | None = None
    """Clips per class, 8 by default; without classes in all, and 64."""
    seed: int = 0
    sigma: float = 1.0
    passes: int | None = None
    """Dummy passes that fix the norm statistics; None: the configuration's."""
    batch: int | None = None
    """Clips per dummy pass."""


@dataclass(frozen=True)
class FiguresRow:
    """A set of clips compared with the reference."""

    name: str
    num_clips: int
    figures: Figures
    ratios: Ratios
    spectral_distance: float
    """Mean of `spectral_distances` over four frames, from the reference."""


@dataclass(frozen=True)
class Report:
    """Everything that was found, and of what."""

    about: dict[str, Any]
    """Checkpoint, settings and data, as they stand in the JSON file."""
    reference: Figures
    """Of the real clips that all rows are compared with."""
    rows: list[FiguresRow]
    note: str
    examples: list[tuple[str, Tensor]]
    """Rows of a picture: what they are, and a clip of each class, [B, T, C, H, W] in [-1, 1]."""

    def to_tree(self) -> dict[str, Any]:
        """For JSON."""
        rows = [
            {
                "name": row.name,
                "num_clips": row.num_clips,
                "motion_ratio": row.ratios.motion,
                "variety_ratio": row.ratios.variety,
                "least_variety_ratio": row.ratios.least_variety,
                "spectral_distance": row.spectral_distance,
                **_figures_tree(row.figures),
            }
            for row in self.rows
        ]
        return {
            **self.about,
            "note": self.note or None,
            "rows": rows,
            "reference": _figures_tree(self.reference),
        }

    def table(self) -> str:
        """A few lines for a person."""
        about = self.about
        shape = f"{about['resolution']}x{about['resolution']}/{about['num_frames']}"
        kinds = [kind for kind in VIEWS if kind in self.reference.recognised]
        head = ["motion", "at start, end", "judder", "persistence", "PSD"]
        head += [*(f"by {kind}" for kind in kinds), "variety"]
        cells = [["", *head], *(_cells(row, kinds) for row in self.rows)]
        for control in cells[3:]:
            control[0] = f"  {control[0]}"
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        lines = [
            f"Stage {about['stage']} at step {about['step']}: {self.rows[0].num_clips} clips of "
            f"{shape}, sigma {about['sigma']:g}, norm statistics fixed by {about['passes']} passes"
        ]
        for first, *others in cells:
            padded = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
            lines.append("  ".join((f"  {first.ljust(widths[0])}", *padded)))
        lines += _LEGEND[: None if kinds else -1]
        return "\n".join([*lines, *([f"note: {self.note}"] if self.note else [])])


def report(
    checkpoint: TrainedCascade,
    options: ReportOptions,
    device: torch.device,
    say: Callable[[str], None] = print,
) -> Report:
    """Generate, read real clips, train the classifiers, measure.

    Raises UserError, before anything is generated, where the real data does not do.
    """
    config = checkpoint.config()
    number = checkpoint.stage_number
    if options.data is not None:
        data = config.data.model_copy(update={"path": options.data, "procedural": None})
        config = config.model_copy(update={"data": data})
    conditional = config.data.num_classes is not None
    period = config.unrolling(number)
    stage = config.stages[number]
    shape = ClipShape(config.stages[1].num_frames * period, stage.frame_stride, stage.resolution)
    if shape.num_frames < _LEAST_FRAMES:
        raise UserError(f"clips of {shape.num_frames} frames are too short for figures of motion")
    num = options.num or (_DEFAULT_NUM if conditional else _DEFAULT_NUM_UNLABELLED)
    videos = find_real_videos(
        config,
        checkpoint.classes,
        num_source_frames=shape.num_source_frames,
        num_per_class=num,
        held_out_path=options.held_out,
        seed=options.seed,
        say=say,
    )
    reals = reference_halves(videos, config, shape, device, options.seed)
    recognisers: dict[str, Recogniser] = {}
    if conditional:
        clips_BTCHW, labels_B = training_clips(videos, config, shape, device, options.seed)
        recognisers = {
            name: train_classifier(clips_BTCHW, labels_B, view, seed=options.seed)
            for name, view in VIEWS.items()
        }
    plan = SamplePlan(
        checkpoint=checkpoint,
        labels=[label if conditional else None for _ in range(num) for label in videos.classes],
        num_frames=shape.num_frames,
        sigma=options.sigma,
        seed=options.seed,
        passes=choose_passes(
            checkpoint,
            num_frames=shape.num_frames,
            sigma=options.sigma,
            seed=options.seed,
            num_passes=options.passes,
            batch_size=options.batch,
        ),
    )

    def figures(clips: LabelledClips) -> Figures:
        return measure(*clips, period=period, recognisers=recognisers)

    looked_at = frames_looked_at(shape.num_frames)
    generated = _generated(plan, device)
    reference = figures(reals[0])
    reference_KR = spectra(reals[0].video_BTCHW, looked_at)
    rows = []
    for name, clips in (
        ("generated", generated),
        ("real against real", reals[1]),
        *spoilt(reals[1], period, options.seed),
    ):
        found = figures(clips)
        off = spectral_distances(spectra(clips.video_BTCHW, looked_at), reference_KR)
        compared = compare(found, reference)
        rows.append(FiguresRow(name, len(clips.video_BTCHW), found, compared, sum(off) / len(off)))
    examples = [
        (name, _of_each_class(clips, videos.classes, number))
        for name, clips in (("real", reals[0]), ("generated", generated))
        for number in range(_NUM_EXAMPLE_ROWS)
    ]
    return Report(_about(plan, shape, videos, options), reference, rows, videos.note, examples)


def spoilt(clips: LabelledClips, period: int, seed: int) -> Iterator[tuple[str, LabelledClips]]:
    """The controls: real clips, spoilt in one way each, and what they are called.

    Each must fail its figure: motion and variety, persistence, judder, motion at the ends, variety,
    detail, classes.
    """
    video_BTCHW, labels_B = clips
    num_frames, height = video_BTCHW.shape[1], video_BTCHW.shape[3]
    yield (
        "first frame frozen",
        clips._replace(video_BTCHW=video_BTCHW[:, :1].expand_as(video_BTCHW)),
    )
    random = torch.Generator().manual_seed(derived_seed(_SHUFFLES, seed))
    orders = [torch.randperm(video_BTCHW.shape[1], generator=random) for _ in video_BTCHW]
    shuffled = [clip[order] for clip, order in zip(video_BTCHW, orders, strict=True)]
    yield "frames shuffled", clips._replace(video_BTCHW=torch.stack(shuffled))
    if period > 1:
        repeated = video_BTCHW[:, ::period].repeat_interleave(period, dim=1)
        yield "frames repeated", clips._replace(video_BTCHW=repeated)
    if quarter := (num_frames - 1) // 4:
        seen = torch.arange(num_frames).clamp(quarter, num_frames - 1 - quarter)
        yield "ends at rest", clips._replace(video_BTCHW=video_BTCHW[:, seen])
    yield "one clip per class", clips._replace(video_BTCHW=_one_per_class(video_BTCHW, labels_B))
    if height > COARSE_PIXELS:
        yield (
            f"{COARSE_PIXELS}x{COARSE_PIXELS} pixels",
            clips._replace(video_BTCHW=_coarse(video_BTCHW)),
        )
    if labels_B is not None and len(labels_B.unique()) > 1:
        # The clips of another class, in the same order.
        other_B = _next_class(labels_B)
        yield "of another class", clips._replace(labels_B=other_B)


def _coarse(video_BTCHW: Tensor) -> Tensor:
    """Nothing but the means of squares, COARSE_PIXELS to a side: no detail of later stages."""
    frames_NCHW = video_BTCHW.flatten(0, 1)
    coarse = F.adaptive_avg_pool2d(frames_NCHW, COARSE_PIXELS)
    return F.interpolate(coarse, video_BTCHW.shape[3:]).unflatten(0, video_BTCHW.shape[:2])


def _next_class(labels_B: Tensor) -> Tensor:
    classes = labels_B.unique()
    places_B = torch.searchsorted(classes, labels_B)
    return classes[(places_B + 1) % len(classes)]


def _of_each_class(clips: LabelledClips, classes: list[int], number: int) -> Tensor:
    """The `number`-th clip of each class, or of all without classes."""
    if clips.labels_B is None:
        return clips.video_BTCHW[number : number + 1]
    found = [int((clips.labels_B == label).nonzero()[number]) for label in classes]
    return clips.video_BTCHW[found]


def _one_per_class(video_BTCHW: Tensor, labels_B: Tensor | None) -> Tensor:
    """Every clip replaced by the first one of its class."""
    if labels_B is None:
        return video_BTCHW[:1].expand_as(video_BTCHW)
    labels = labels_B.tolist()
    return video_BTCHW[[labels.index(label) for label in labels]]


def _generated(plan: SamplePlan, device: torch.device) -> LabelledClips:
    """What engine/sample.py would write, before it is encoded."""
    forbid_tf32()
    cascade = load_trained(plan.checkpoint, device)
    fix_norms(cascade, plan.checkpoint, plan.passes)
    clips = tqdm(generate(cascade, plan), "generating", total=len(plan.labels), unit="clip")
    video_BTCHW = torch.stack(list(clips)).float().div_(127.5).sub_(1)
    labels = [label for label in plan.labels if label is not None]
    return LabelledClips(video_BTCHW, torch.tensor(labels) if labels else None)


def _about(
    plan: SamplePlan, shape: ClipShape, videos: RealVideos, options: ReportOptions
) -> dict[str, Any]:
    names = plan.checkpoint.classes
    return {
        "checkpoint": str(plan.checkpoint.path),
        "stage": plan.checkpoint.stage_number,
        "step": plan.checkpoint.step,
        "num_clips": len(plan.labels),
        "classes": [names[n] for n in videos.classes] if names else None,
        **asdict(shape),
        "period": plan.checkpoint.config().unrolling(plan.checkpoint.stage_number),
        "seed": plan.seed,
        "sigma": plan.sigma,
        "passes": plan.passes.num_passes,
        "batch": plan.passes.batch_size,
        "data": str(videos.training.root),
        "data_fingerprint": videos.fingerprint,
        "held_out": str(videos.reference.root) if videos.held_out_fingerprint else None,
        "held_out_fingerprint": videos.held_out_fingerprint,
        "num_training_clips": len(videos.training.entries),
    }


def _figures_tree(figures: Figures) -> dict[str, Any]:
    return {
        "motion": figures.motion,
        "ends": figures.ends and figures.ends._asdict(),
        "judder": figures.judder,
        "persistence": figures.persistence,
        "recognised": figures.recognised,
        "variety": {str(label): value for label, value in figures.variety.items()},
    }


def _cells(row: FiguresRow, kinds: list[str]) -> list[str]:
    figures, ratios = row.figures, row.ratios
    ends = "-" if figures.ends is None else "  ".join(_number(value) for value in figures.ends)
    variety = "-"
    if ratios.variety is not None and ratios.least_variety is not None:
        variety = f"{_number(ratios.variety)} ({_number(ratios.least_variety)})"
    return [
        row.name,
        *(_number(ratios.motion), ends, _number(figures.judder)),
        _number(figures.persistence),
        _number(row.spectral_distance),
        *(_number(figures.recognised[kind]) for kind in kinds),
        variety,
    ]


def _number(value: float) -> str:
    """Two decimals; none where they say nothing, and no minus before zeros."""
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}".replace("-0.00", "0.00")
