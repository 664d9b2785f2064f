"""The clips that every rank gets, checked over a whole epoch.

They are of the user's index, or of a made-up one where there is none.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.configuration import Config
from engine.video.dataset import INDEX_NAME, open_dataset
from engine.video.index import VideoEntry, VideoIndex
from engine.video.sampler import ClipSampler, batch_numbers

MADE_UP_VIDEOS = 400_000
"""About Kinetics-600's training videos; as there, they last ten seconds."""
MADE_UP_FRAMES = 300
_FRAMES_PER_SECOND = 30.0


@dataclass(frozen=True)
class FoundIndex:
    """An index, and in words where it comes from."""

    index: VideoIndex
    description: str


def find_index(config: Config, *, asked: bool) -> FoundIndex:
    """The index at `data.path`, else one made up: of the sample data set's size, or Kinetics'.

    `asked`: the user named the data for this rehearsal, so it must be there. Writes nothing.
    Raises UserError with one line.
    """
    path = config.data.path
    exists = path is not None and (Path(path).is_file() or (Path(path) / INDEX_NAME).is_file())
    if asked or exists:
        return FoundIndex(open_dataset(config.data, make=False, say=lambda line: None), str(path))
    made = config.data.procedural
    num_videos, num_frames = (
        (MADE_UP_VIDEOS, MADE_UP_FRAMES) if made is None else (made.num_clips, made.num_frames)
    )
    description = f"made up, {num_videos} videos of {num_frames} frames; --data takes yours"
    return FoundIndex(_made_up(config, num_videos, num_frames), description)


def _made_up(config: Config, num_videos: int, num_frames: int) -> VideoIndex:
    """Videos just large enough, spread evenly over the classes."""
    num_classes = config.data.num_classes or 0
    entries = [
        VideoEntry(
            num_frames=num_frames,
            fps=_FRAMES_PER_SECOND,
            width=config.resolution,
            height=config.resolution,
            rotation=0,
            sample_aspect_ratio="1:1",
            codec="h264",
            pixel_format="yuv420p",
            matrix="unspecified",
            range="unspecified",
            primaries="unspecified",
            transfer="unspecified",
            times_number_frames=True,
            keyframes="",
            sha256="",
            path=f"made-up/{label}",
            label=label if num_classes else None,
            size_bytes=0,
            modified_ns=0,
        )
        for label in range(num_classes or 1)
    ]
    # The same objects again and again: only their number and lengths matter.
    repeated = tuple(entries[number % len(entries)] for number in range(num_videos))
    classes = tuple(str(label) for label in range(num_classes))
    return VideoIndex(Path("made-up"), classes, repeated)


@dataclass(frozen=True)
class Shares:
    """How one epoch is divided among the ranks."""

    epoch: int
    """Clips per epoch: one of each usable video."""
    num_batches: int
    """Global batches, micro-batches of all ranks, until an epoch is through."""
    clips_of_rank: tuple[int, ...]
    """By rank; of the epoch alone, though the last batch goes on into the next one."""
    first_batch: tuple[int, ...]
    """Rank 0's first clips: places in the index."""


def share_epoch(sampler: ClipSampler, *, world_size: int, micro_batch: int) -> Shares:
    """Walk every rank through the first epoch's batches.

    Raises RuntimeError when a clip goes to no rank or to two, or a video is left out: a defect.
    """
    epoch, per_batch = len(sampler), world_size * micro_batch
    positions = range(0, epoch, per_batch)
    times_taken = np.zeros(len(positions) * per_batch, dtype=np.int64)
    clips_of_rank = []
    for rank in range(world_size):
        mine = [
            batch_numbers(position, rank=rank, world_size=world_size, batch_size=micro_batch)
            for position in positions
        ]
        numbers = np.concatenate([np.arange(n.start, n.stop, n.step) for n in mine])
        np.add.at(times_taken, numbers, 1)
        clips_of_rank.append(int((numbers < epoch).sum()))
    if not (times_taken == 1).all():
        odd = int((times_taken != 1).argmax())
        raise RuntimeError(f"clip {odd} goes to {times_taken[odd]} ranks")
    if {sampler.video(number) for number in range(epoch)} != set(sampler.usable_videos.tolist()):
        raise RuntimeError("an epoch is not one clip of every usable video")
    first = batch_numbers(0, rank=0, world_size=world_size, batch_size=micro_batch)
    return Shares(
        epoch=epoch,
        num_batches=len(positions),
        clips_of_rank=tuple(clips_of_rank),
        first_batch=tuple(sampler.video(number) for number in first),
    )
