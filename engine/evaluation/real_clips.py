"""The real clips that a report compares with: which videos, read by the loader that training uses.

Shapes: B clips, T frames, C channels, H x W pixels; [B, T, C, H, W] with values in [-1, 1].
"""

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from engine.configuration import Config, Data
from engine.errors import UserError
from engine.evaluation.classifier import reduced
from engine.processors import cores_per_process
from engine.trainer.ranks import derived_seed
from engine.video.dataset import held_out, open_dataset
from engine.video.index import VideoEntry, VideoIndex
from engine.video.loader import ClipLoader

MAX_CLASSES = 16
"""More are not reported on: clips of all of Kinetics would fill the memory."""
MAX_TRAINING_CLIPS = 512
"""What the classifiers learn from, at most."""
_LEAST_REFERENCE = 4  # two halves of two clips, so that there are pairs
_BATCH_SIZE = 8
_CHOICE, _WINDOWS = "report videos", "report windows"  # streams of random numbers


class LabelledClips(NamedTuple):
    """A set of clips; no labels without classes."""

    video_BTCHW: Tensor
    labels_B: Tensor | None


@dataclass(frozen=True)
class RealVideos:
    """Disjoint videos of the same classes: to compare with, and to train classifiers on."""

    reference: VideoIndex
    training: VideoIndex
    classes: list[int]
    """Those that are reported on, by number; [0] without classes."""
    fingerprint: str
    """Of the training data."""
    held_out_fingerprint: str | None
    """None where the reference videos are the training data's own."""
    note: str
    """What a reader of the report must know of them; one line, or nothing."""


def find_real_videos(
    config: Config,
    names: list[str],
    *,
    num_source_frames: int,
    num_per_class: int,
    held_out_path: str | None,
    seed: int,
    say: Callable[[str], None],
) -> RealVideos:
    """Choose 2 * `num_per_class` reference videos per class where there are as many, by `seed`.

    They are of the data at `held_out_path`, of the sample set's held-out clips, which are made
    when they are not there, or else of the training data itself, without those that the classifiers
    then train on. `names` are the classes' that the checkpoint was trained on. Only videos of
    `num_source_frames` or more count. Raises UserError when too few are left.
    """
    data = config.data
    conditional = data.num_classes is not None
    index = open_dataset(data, make=True, say=say)
    by_class = _by_class(index, names, num_source_frames, conditional)
    random_state = random.Random(derived_seed(_CHOICE, seed))
    for entries in by_class.values():
        random_state.shuffle(entries)
    held_out_data = held_out(data)
    if held_out_path is not None:
        held_out_data = data.model_copy(update={"path": held_out_path, "procedural": None})
    held_out_index, note = None, ""
    if held_out_data is not None:
        held_out_index = open_dataset(held_out_data, make=True, say=say)
        if held_out_index.fingerprint() == index.fingerprint():
            raise UserError(
                f"--held-out {held_out_data.path} holds the videos that were trained on; name "
                "others"
            )
        reference = _by_class(held_out_index, names, num_source_frames, conditional)
        for entries in reference.values():
            random_state.shuffle(entries)
    else:
        note = (
            "the real clips are of the training data itself: clips that were learned by heart "
            "count as good; name others with --held-out"
        )
        reference = {label: entries[: len(entries) // 2] for label, entries in by_class.items()}
    # Both halves of the reference are as long; of one clip there are no pairs.
    num_used = {
        label: min(2 * num_per_class, len(entries) // 2 * 2) for label, entries in reference.items()
    }
    usable = [n for n in sorted(by_class) if num_used.get(n, 0) >= _LEAST_REFERENCE]
    if not usable:
        where = (held_out_index or index).root
        needed = _LEAST_REFERENCE * (1 if held_out_index else 2)
        raise UserError(
            f"too few videos in {where} to compare with: {needed} of a class, of "
            f"{num_source_frames} frames or more; name other data with --data or --held-out"
        )
    classes = _evenly(usable, MAX_CLASSES)
    if len(classes) < len(by_class):
        note += f"{'; ' if note else ''}{len(classes)} of {len(by_class)} classes are compared"
    used = {label: reference[label][: num_used[label]] for label in classes}
    learned = {
        label: by_class[label][0 if held_out_index else num_used[label] :] for label in classes
    }
    most = max(1, MAX_TRAINING_CLIPS // len(classes))
    return RealVideos(
        reference=_subset(held_out_index or index, used),
        training=_subset(index, {label: entries[:most] for label, entries in learned.items()}),
        classes=classes,
        fingerprint=index.fingerprint(),
        held_out_fingerprint=held_out_index.fingerprint() if held_out_index else None,
        note=note,
    )


@dataclass(frozen=True)
class ClipShape:
    """The shape of a stage's clips: which frames of a video they are of, and how large."""

    num_frames: int
    frame_stride: int
    resolution: int

    @property
    def num_source_frames(self) -> int:
        """Frames of a video from a clip's first to its last, both counted."""
        return (self.num_frames - 1) * self.frame_stride + 1


def reference_halves(
    videos: RealVideos, config: Config, shape: ClipShape, device: torch.device, seed: int
) -> tuple[LabelledClips, LabelledClips]:
    """Two sets of real clips with the same number of each class, no video in both; on the CPU."""
    batches = list(_batches(videos.reference, config, shape, device, seed))
    video_BTCHW = torch.cat([batch.video_BTCHW for batch in batches])
    labels_B = torch.cat([batch.labels for batch in batches])
    of_class = [(labels_B == label).nonzero()[:, 0] for label in videos.classes]
    first = torch.cat([numbers[0::2] for numbers in of_class])
    second = torch.cat([numbers[1::2] for numbers in of_class])

    def half(numbers: Tensor) -> LabelledClips:
        conditional = config.data.num_classes is not None
        return LabelledClips(video_BTCHW[numbers], labels_B[numbers] if conditional else None)

    return half(first), half(second)


def training_clips(
    videos: RealVideos, config: Config, shape: ClipShape, device: torch.device, seed: int
) -> tuple[Tensor, Tensor]:
    """Clips and labels for the classifiers, reduced to what those see; on the CPU."""
    clips, labels = [], []
    for batch in _batches(videos.training, config, shape, device, seed):
        clips.append(reduced(batch.video_BTCHW))
        labels.append(batch.labels)
    return torch.cat(clips), torch.cat(labels)


class _Batch(NamedTuple):
    video_BTCHW: Tensor
    labels: Tensor


def _batches(
    index: VideoIndex, config: Config, shape: ClipShape, device: torch.device, seed: int
) -> Iterator[_Batch]:
    """A random window of every video of the index, once, as training would read it."""
    data: Data = config.data
    num_left = len(index.entries)
    loader = ClipLoader(
        index,
        num_frames=shape.num_frames,
        frame_stride=shape.frame_stride,
        resolution=config.resolution,
        view_resolution=shape.resolution,
        batch_size=min(_BATCH_SIZE, num_left),
        seed=derived_seed(_WINDOWS, seed),
        random_crop=data.random_crop,
        horizontal_flip=data.horizontal_flip,
        decoder=data.decoder,
        device=device,
        num_threads=data.num_threads or cores_per_process(),
    )
    with contextlib.closing(loader):
        while num_left > 0:  # an epoch has each video once
            clips = next(loader)
            # Clips are [B, T, H, W, C] in memory.
            video_BTCHW = clips.video_BTCHW[:num_left].cpu().contiguous()
            yield _Batch(video_BTCHW, clips.labels_B[:num_left].cpu())
            num_left -= len(video_BTCHW)


def _by_class(
    index: VideoIndex, names: list[str], num_source_frames: int, conditional: bool
) -> dict[int, list[VideoEntry]]:
    """The videos that are long enough, by the class's number in the checkpoint; 0 without."""
    by_class: dict[int, list[VideoEntry]] = {}
    if conditional and not index.classes:
        raise UserError(f"the data in {index.root} has no classes; the checkpoint was trained with")
    for entry in index.entries:
        if entry.num_frames < num_source_frames:
            continue
        label = 0
        if conditional and entry.label is not None:
            name = index.classes[entry.label]
            if name not in names:
                raise UserError(
                    f"{index.root} has the class {name!r}, which the checkpoint was not trained on"
                )
            label = names.index(name)
        by_class.setdefault(label, []).append(dataclasses.replace(entry, label=label))
    return by_class


def _subset(index: VideoIndex, entries: dict[int, list[VideoEntry]]) -> VideoIndex:
    """Its labels are the checkpoint's numbers, which `entries` have."""
    chosen = tuple(entry for label in sorted(entries) for entry in entries[label])
    return VideoIndex(index.root, (), chosen)


def _evenly(values: list[int], most: int) -> list[int]:
    """At most so many, evenly spaced."""
    num = min(most, len(values))
    return [values[i * len(values) // num] for i in range(num)]
