"""Sampling from a trained cascade: labels, norm statistics, videos, files."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from tqdm import tqdm

from engine.configuration import Config
from engine.durable_files import make_writable_folder, writing
from engine.errors import UserError
from engine.models.cascade import Cascade
from engine.models.norms import fix_norm_statistics, norm_statistics
from engine.trainer.checkpoints import GENERATOR, Checkpoint, read_tensors, write_tensors
from engine.trainer.fakes import LatentSource
from engine.trainer.ranks import derived_seed
from engine.trainer.standing_statistics import fix_standing_statistics
from engine.video.writing import contact_sheet, grid, to_uint8, write_mp4

STATISTICS = "norm-statistics.pt"
SAMPLES = "samples.json"
GRID = "grid.mp4"
SHEET = "contact-sheet.png"
NUM_SHOWN = 64
"""Clips in the grid and the contact sheet, which lie in memory and are looked at."""
_PASSES, _CLIPS = "sampling passes", "sampled clip"  # streams of random numbers


@dataclass(frozen=True)
class SamplePlan:
    """What is generated; two equal plans give equal videos."""

    checkpoint: Checkpoint
    labels: list[int | None]
    """A class per clip; None without classes."""
    num_frames: int
    sigma: float
    """Standard deviation of z: 1 for metrics, 0.5 for pictures (paper)."""
    seed: int
    num_passes: int
    """Dummy passes that fix the norm statistics; the paper runs 200."""
    batch_size: int
    """Clips per dummy pass."""


def choose_labels(wanted: str | None, num: int | None, checkpoint: Checkpoint) -> list[int | None]:
    """A label per clip: the wanted classes in turn, by default all that were trained on.

    `wanted` holds numbers or names, separated by commas. Raises UserError for unknown ones.
    """
    num_classes = checkpoint.config().data.num_classes
    if num_classes is None:
        if wanted is not None:
            raise UserError("--classes: this checkpoint was trained without classes")
        return [None] * (num or 8)
    names = checkpoint.meta["classes"]
    # The data may have fewer classes than the networks.
    labels = [label for label, count in enumerate(checkpoint.class_counts) if count]
    if wanted is not None:
        labels = [_class_number(text.strip(), num_classes, names) for text in wanted.split(",")]
    num = num or min(len(labels), 16)
    return [labels[i % len(labels)] for i in range(num)]


def beyond_training(config: Config, stage_number: int, num_frames: int) -> list[str]:
    """A line for each recurrent stage that generates more frames than it was trained on.

    Convolutions in time run over any length as they were trained to; a ConvGRU's state was never
    trained for what comes after its last frame.
    """
    made_by_first = -(-num_frames // config.unrolling(stage_number))
    notes = []
    for number in range(1, stage_number + 1):
        stage, made = config.stages[number], made_by_first * config.unrolling(number)
        if number > 1:
            upsampling = config.upsampling(number)
            made += 2 * stage.generator.edge_frames * upsampling.frame_step
        if stage.generator.temporal == "conv_gru" and made > stage.num_frames:
            notes.append(
                f"stage {number} is recurrent and was trained on {stage.num_frames} frames; "
                f"it generates {made}, and motion may fade after the {stage.num_frames}th"
            )
    return notes


def make_writable(out: Path, plan: SamplePlan) -> None:
    """Make the folder; UserError when it cannot be written to. Due before the long passes."""
    make_writable_folder(out)
    for file in (STATISTICS, GRID, SHEET, SAMPLES, *_clip_files(_names(plan))):
        if (out / file).is_dir():
            raise UserError(f"cannot write {out / file}: it is a folder")


def fix_statistics(cascade: Cascade, plan: SamplePlan, out: Path) -> None:
    """Fix the norms as `run_passes` does and keep the statistics in `out`, for the next time."""
    path = out / STATISTICS
    key = {
        "generator": plan.checkpoint.meta["files"][GENERATOR][1],
        "classes": plan.checkpoint.class_counts,
        "frames": plan.num_frames,
        "sigma": plan.sigma,
        "passes": plan.num_passes,
        "batch": plan.batch_size,
        "seed": plan.seed,
    }
    if path.exists():
        kept = read_tensors(path)
        if not (isinstance(kept, dict) and kept.keys() == {"key", "stages"}):
            raise UserError(f"{path} is not a file of sample.py's: move it, or use another --out")
        if kept["key"] == key:
            for generator, statistics in zip(cascade.generators, kept["stages"], strict=True):
                fix_norm_statistics(generator, statistics)
            return
    run_passes(cascade, plan)
    statistics = [norm_statistics(generator) for generator in cascade.generators]
    write_tensors(path, {"key": key, "stages": statistics})


def run_passes(cascade: Cascade, plan: SamplePlan) -> None:
    """Fix the norms at the plan's length, by dummy passes.

    Decided: the passes draw z with the σ that is sampled with, as BigGAN does for truncation;
    statistics of σ = 1 do not fit activations of σ = 0.5. Decided: they draw classes as often as
    the data has them, as training does; embeddings that were never trained shall not count.
    """
    config, stages = cascade.config, list(cascade.generators)
    clip_frames = -(-plan.num_frames // config.unrolling(len(stages)))
    latents = LatentSource(
        config,
        plan.checkpoint.class_counts,
        derived_seed(_PASSES, plan.seed),
        next(cascade.parameters()).device,
        sigma=plan.sigma,
    )

    def run_stage(number: int, zs: list[Tensor], labels_B: Tensor | None) -> None:
        to_it = Cascade(stages[:number], config)
        to_it.generate(zs, labels_B, clip_frames * config.unrolling(number))

    with tqdm(total=plan.num_passes * len(stages), desc="norm statistics", unit="pass") as bar:
        fix_standing_statistics(
            cascade,
            latents=latents,
            batch_size=plan.batch_size,
            num_passes=plan.num_passes,
            run_stage=run_stage,
            on_pass=bar.update,
        )


def generate(cascade: Cascade, plan: SamplePlan) -> Iterator[Tensor]:
    """A uint8 video [T, 3, H, W] on the CPU for each label; UserError when it is not finite.

    Clip by clip, each from a seed of its own: the n-th clip of a class is the same video whatever
    else is asked for, and memory does not grow with their number.
    """
    device = next(cascade.parameters()).device
    counts: Counter[int | None] = Counter()
    for label in plan.labels:
        class_part = 0 if label is None else label + 1
        seed = derived_seed(_CLIPS, plan.seed, class_part, counts[label])
        counts[label] += 1
        latents = LatentSource(cascade.config, (), seed, device, sigma=plan.sigma)
        labels_B = None if label is None else torch.tensor([label], device=device)
        zs = latents.latents(1, len(cascade.generators))
        video_BTCHW = cascade.generate(zs, labels_B, plan.num_frames)
        if not video_BTCHW.isfinite().all():  # uint8 would hide it
            raise UserError(
                f"{plan.checkpoint.path} generates values that are not finite with sigma "
                f"{plan.sigma:g}; choose a smaller --sigma or an earlier checkpoint"
            )
        yield to_uint8(video_BTCHW)[0].cpu()


def write(out: Path, videos: Iterable[Tensor], plan: SamplePlan) -> None:
    """An mp4 per clip as it comes, the first ones in one and in a sheet, and what was asked for.

    Each clip is let go when it is written; only the NUM_SHOWN first ones are kept for the grid.
    Written aside and moved when all are there: until then an earlier run's files stay as they are.
    Those of its clips that this one does not write are removed. Raises UserError when something
    cannot be written.
    """
    old_clips = _listed_clips(out)
    with writing(out):
        with TemporaryDirectory(prefix=".writing-", dir=out) as aside:
            clip_files = _write_clips(Path(aside), videos, plan)
            for file in (*clip_files, GRID, SHEET, SAMPLES):
                (Path(aside) / file).replace(out / file)
        for file in old_clips.difference(clip_files):
            (out / file).unlink(missing_ok=True)


def _write_clips(folder: Path, videos: Iterable[Tensor], plan: SamplePlan) -> list[str]:
    """Everything that `write` writes, into `folder`; the names of the clips' files."""
    names = _names(plan)
    files = _clip_files(names)
    fps = plan.checkpoint.meta["frames_per_second"]
    stage = plan.checkpoint.config().stages[plan.checkpoint.stage_number]
    scale = max(1, 128 // stage.resolution)
    clips: list[dict[str, str]] = []
    shown: list[Tensor] = []
    with_files = zip(videos, files, strict=True)
    for video_TCHW, file in tqdm(with_files, "generating", total=len(files), unit="clip"):
        write_mp4(folder / file, video_TCHW, fps, scale=scale)
        digest = hashlib.sha256(video_TCHW.numpy().tobytes()).hexdigest()
        clips.append({"file": file, "sha256": digest})
        if len(shown) < NUM_SHOWN:
            shown.append(video_TCHW)
    shown_BTCHW = torch.stack(shown)
    columns = max(1, round(len(shown) ** 0.5))
    write_mp4(folder / GRID, grid(shown_BTCHW, columns), fps, scale=scale)
    contact_sheet(shown_BTCHW, folder / SHEET, labels=names[: len(shown)])
    asked = {
        "checkpoint": str(plan.checkpoint.path),
        "labels": plan.labels,
        "frames": plan.num_frames,
        "sigma": plan.sigma,
        "seed": plan.seed,
        "passes": plan.num_passes,
        "batch": plan.batch_size,
        "frames_per_second": fps,
        "clips": clips,
    }
    (folder / SAMPLES).write_text(json.dumps(asked, indent=1) + "\n")
    return files


def _names(plan: SamplePlan) -> list[str]:
    """Each clip's class, by its number where the data set named none."""
    names = dict(enumerate(plan.checkpoint.meta["classes"]))
    return [
        "video" if label is None else names.get(label, f"class {label}") for label in plan.labels
    ]


def _clip_files(names: list[str]) -> list[str]:
    safe = [name.replace(" ", "-").replace("/", "-") for name in names]
    return [f"clip-{number:03d}-{name}.mp4" for number, name in enumerate(safe)]


def _listed_clips(out: Path) -> set[str]:
    """The clips that samples.json in `out` lists; nothing when it is missing or not ours."""
    try:
        files = [clip["file"] for clip in json.loads((out / SAMPLES).read_text())["clips"]]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    # Never beyond what `write` could have made.
    return {file for file in files if fnmatch(str(file), "clip-*.mp4") and "/" not in file}


def _class_number(text: str, num_classes: int, names: list[str]) -> int:
    if text in names:
        return names.index(text)
    if text.isdecimal() and int(text) < num_classes:
        return int(text)
    raise UserError(f"--classes: {text!r} is neither a class name nor 0 to {num_classes - 1}")
