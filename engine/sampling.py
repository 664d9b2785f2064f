"""Sampling from a trained cascade: labels, norm statistics, videos."""

import csv
import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.configuration import Config
from engine.dummy_passes import DummyPasses, TrainedCascade, run_passes
from engine.errors import UserError
from engine.exported import fix_norms
from engine.models.cascade import GeneratorCascade
from engine.models.norms import fix_norm_statistics, norm_statistics
from engine.trainer.checkpoints import read_tensors, write_tensors
from engine.trainer.fakes import LatentSource
from engine.trainer.ranks import derived_seed
from engine.video.writing import to_uint8

STATISTICS = "norm-statistics.pt"
CHUNK_FRAMES = 64
"""Frames made at once. Of the paper's Kinetics cascade they take 3 GB in bf16 (counted)."""
_CLIPS = "sampled clip"  # a stream of random numbers


@dataclass(frozen=True)
class SamplePlan:
    """What is generated; two equal plans give equal videos."""

    checkpoint: TrainedCascade
    labels: list[int | None]
    """A class per clip; None without classes."""
    num_frames: int
    sigma: float
    """Standard deviation of z: 1 for metrics, 0.5 for pictures (paper)."""
    seed: int
    passes: DummyPasses
    """They fix the norm statistics. With `windows` clips are windows, too: of the last stage's
    training length, made of a random window of the stage before's clip (the paper's footnote 1)."""
    interpolated: int | None = None
    """So many clips of a class lead from one latent to another; None: each has its own."""


def choose_labels(
    wanted: str | None, num: int | None, checkpoint: TrainedCascade
) -> list[int | None]:
    """A label per clip: the wanted classes in turn, by default all that were trained on.

    `wanted` is one name, or numbers and names separated by commas; as in CSV, a name with a comma
    stands in double quotes. Raises UserError for unknown ones.
    """
    num_classes = checkpoint.config().data.num_classes
    if num_classes is None:
        if wanted is not None:
            raise UserError("--classes: this checkpoint was trained without classes")
        return [None] * (num or 8)
    names = checkpoint.classes
    # The data may have fewer classes than the networks.
    labels = [label for label, count in enumerate(checkpoint.class_counts) if count]
    if wanted is not None:
        asked = [wanted] if wanted in names else _separated(wanted)
        labels = [_class_number(text.strip(), num_classes, names) for text in asked]
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


def fix_statistics(cascade: GeneratorCascade, plan: SamplePlan, out: Path) -> None:
    """Fix the norms as the plan's passes do and keep the statistics in `out`, for the next time.

    An exported cascade has those of its own passes.
    """
    trained = plan.checkpoint
    if plan.passes == trained.passes:
        fix_norms(cascade, trained, plan.passes)
        return
    path = out / STATISTICS
    key = {
        "generator": trained.digest,
        "classes": trained.class_counts,
        **dataclasses.asdict(plan.passes),
    }
    if path.exists():
        kept = read_tensors(path)
        if not (isinstance(kept, dict) and kept.keys() == {"key", "stages"}):
            raise UserError(f"{path} is not a file of sample.py's: move it, or use another --out")
        if kept["key"] == key:
            for generator, statistics in zip(cascade.generators, kept["stages"], strict=True):
                fix_norm_statistics(generator, statistics)
            return
    run_passes(cascade, trained, plan.passes)
    statistics = [norm_statistics(generator) for generator in cascade.generators]
    write_tensors(path, {"key": key, "stages": statistics})


def generate(cascade: GeneratorCascade, plan: SamplePlan) -> Iterator[Tensor]:
    """A uint8 video [T, 3, H, W] on the CPU for each label, as `stream` makes it."""
    for chunks in stream(cascade, plan):
        yield torch.cat(list(chunks))


def stream(
    cascade: GeneratorCascade,
    plan: SamplePlan,
    on_chunk: Callable[[int, Tensor], object] = lambda number, video_TCHW: None,
    numbers: Collection[int] | None = None,
) -> Iterator[Iterator[Tensor]]:
    """For each label a uint8 video in chunks [t, 3, H, W] on the CPU; UserError if not finite.

    Clip by clip, each from a seed of its own: the n-th clip of a class is the same video whatever
    else is asked for. Memory grows neither with their number nor with their length. `on_chunk` is
    given what each stage before the last makes meanwhile, with the stage's number. With `numbers`
    only those of the plan's clips.
    """
    counts: Counter[int | None] = Counter()
    for number, label in enumerate(plan.labels):
        if numbers is None or number in numbers:
            yield _chunks(cascade, plan, label, counts[label], on_chunk)
        counts[label] += 1


def _chunks(
    cascade: GeneratorCascade,
    plan: SamplePlan,
    label: int | None,
    number: int,
    on_chunk: Callable[[int, Tensor], object],
) -> Iterator[Tensor]:
    """Of the `number`-th clip of a class."""
    device = next(cascade.parameters()).device
    class_part = 0 if label is None else label + 1
    labels_B = None if label is None else torch.tensor([label], device=device)

    def draw(clip: int) -> tuple[list[Tensor], torch.Generator]:
        seed = derived_seed(_CLIPS, plan.seed, class_part, clip)
        latents = LatentSource(cascade.config, (), seed, device, sigma=plan.sigma)
        return latents.latents(1, len(cascade.generators)), latents.random

    if plan.interpolated is None:
        zs, random = draw(number)
    else:
        walk, step = divmod(number, plan.interpolated)  # a later walk begins where one ends
        (begin, random), (end, _) = draw(walk), draw(walk + 1)
        part = step / max(1, plan.interpolated - 1)
        zs = [interpolate(*pair, part) for pair in zip(begin, end, strict=True)]

    def as_pixels(video_BTCHW: Tensor) -> Tensor:
        if not video_BTCHW.isfinite().all():  # uint8 would hide it
            raise UserError(
                f"{plan.checkpoint.path} generates values that are not finite with sigma "
                f"{plan.sigma:g}; choose a smaller --sigma or an earlier checkpoint"
            )
        return to_uint8(video_BTCHW)[0].cpu()

    if plan.passes.windows:
        last = len(cascade.generators)
        yield as_pixels(cascade.sample_previous(last + 1, zs, labels_B, random))
        return
    ends = [*range(CHUNK_FRAMES, plan.num_frames, CHUNK_FRAMES), plan.num_frames]
    for video_BTCHW in cascade.stream(
        zs, labels_B, ends, lambda stage, low_BTCHW: on_chunk(stage, as_pixels(low_BTCHW))
    ):
        yield as_pixels(video_BTCHW)


def interpolate(begin_BZ: Tensor, end_BZ: Tensor, part: float) -> Tensor:
    """A latent on the way from one to the other, 0 <= `part` <= 1, along the great circle.

    On the straight line latents are shorter in the middle than any that training draws; the length
    here goes evenly from the one's to the other's (White 2016, "Sampling generative networks").
    """
    lengths = [z.norm(dim=1, keepdim=True) for z in (begin_BZ, end_BZ)]
    first, second = (z / length for z, length in zip((begin_BZ, end_BZ), lengths, strict=True))
    angle = (first * second).sum(1, keepdim=True).clamp(-1, 1).acos()
    near = angle.sin() < 1e-6  # the same direction, or opposite ones, which have no great circle
    weights = [((1 - part) * angle).sin() / angle.sin(), (part * angle).sin() / angle.sin()]
    first_weight, second_weight = (
        torch.where(near, torch.full_like(angle, straight), weight)
        for straight, weight in zip((1 - part, part), weights, strict=True)
    )
    direction = first_weight * first + second_weight * second
    return direction * torch.lerp(lengths[0], lengths[1], part)


def _separated(wanted: str) -> list[str]:
    """The cells of a line of CSV."""
    try:
        rows = list(csv.reader([wanted], skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise UserError(f"--classes: {wanted!r} cannot be read as CSV: {error}") from None
    return rows[0] if rows and rows[0] else [""]


def _class_number(text: str, num_classes: int, names: list[str]) -> int:
    if text in names:
        return names.index(text)
    if text.isdecimal() and int(text) < num_classes:
        return int(text)
    raise UserError(f"--classes: {text!r} is neither a class name nor 0 to {num_classes - 1}")
