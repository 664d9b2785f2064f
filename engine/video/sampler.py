"""The clips that are trained on, as a pure function of (seed, clip number) without state to save.

Clip number k runs over all ranks and epochs. Epoch k // N is a random permutation of the N usable
videos; each gives one window, at a random start. Global batch b holds the numbers
[b * G, (b + 1) * G) for global batch size G, whatever the number of ranks that share it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

_U64_MAX = 2**64 - 1
_Words = TypeVar("_Words", int, NDArray[Any])  # uint64; the stubs lose it on the way
# What a random number is drawn for; each gets a stream of its own.
_ORDER, _START, _CROP_X, _CROP_Y, _FLIP, _REPLACEMENT = range(6)


@dataclass(frozen=True, slots=True)
class ClipRequest:
    """One clip to decode."""

    number: int
    video: int
    """Position in the index's entries."""
    start_frame: int
    crop_x: float
    """In [0, 1]: 0 keeps the left edge, 1 the right."""
    crop_y: float
    flip: bool
    """Mirror left and right."""


class ClipSampler:
    """Clip number -> ClipRequest.

    `video_lengths` are frames per video; videos shorter than a window,
    (num_frames - 1) * frame_stride + 1 source frames, are left out (`num_too_short`). Raises
    ValueError when none is left.
    """

    def __init__(
        self,
        video_lengths: Sequence[int],
        *,
        num_frames: int,
        frame_stride: int,
        seed: int,
        random_crop: bool,
        horizontal_flip: bool,
    ) -> None:
        self.window_frames = (num_frames - 1) * frame_stride + 1
        lengths = np.asarray(video_lengths, dtype=np.int64)
        self.usable_videos = np.flatnonzero(lengths >= self.window_frames)
        self.num_too_short = len(lengths) - len(self.usable_videos)
        if not len(self.usable_videos):
            raise ValueError(f"no video has {self.window_frames} frames")
        self._num_starts = lengths[self.usable_videos] - self.window_frames + 1
        self._seed = seed
        self._random_crop = random_crop
        self._horizontal_flip = horizontal_flip
        self._orders: dict[int, NDArray[np.int64]] = {}

    def __len__(self) -> int:
        """Clips per epoch: one per usable video."""
        return len(self.usable_videos)

    def video(self, number: int) -> int:
        """Which video the clip with this number (any from 0) is of: its place in the index."""
        return int(self.usable_videos[self._usable(number)])

    def request(self, number: int) -> ClipRequest:
        """The clip with this number (any number from 0)."""
        return self._request(number, self._usable(number), 0)

    def replacement(self, number: int, attempt: int) -> ClipRequest:
        """A clip of any video in the stead of one that cannot be read; `attempt` counts from 1."""
        usable = int(self._uniform(_REPLACEMENT, number, attempt) * len(self))
        return self._request(number, usable, attempt)

    def _request(self, number: int, usable: int, attempt: int) -> ClipRequest:
        return ClipRequest(
            number=number,
            video=int(self.usable_videos[usable]),
            start_frame=int(self._uniform(_START, number, attempt) * self._num_starts[usable]),
            crop_x=self._uniform(_CROP_X, number, attempt) if self._random_crop else 0.5,
            crop_y=self._uniform(_CROP_Y, number, attempt) if self._random_crop else 0.5,
            flip=self._horizontal_flip and self._uniform(_FLIP, number, attempt) < 0.5,
        )

    def _usable(self, number: int) -> int:
        epoch, place = divmod(number, len(self))
        return int(self._order(epoch)[place])

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            keys = _hash(self._seed, _ORDER, epoch, np.arange(len(self), dtype=np.uint64))
            # A batch can lie across two epochs: keep the last two.
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = np.argsort(keys, kind="stable")
        return self._orders[epoch]

    def _uniform(self, stream: int, number: int, attempt: int) -> float:
        """A number in [0, 1): the hash's 53 high bits, as many as a float holds."""
        return (_hash(self._seed, stream, attempt, number) >> 11) * 2.0**-53


def batch_numbers(position: int, *, rank: int, world_size: int, batch_size: int) -> range:
    """The clip numbers of a rank's batch, once all ranks together have taken `position` clips.

    Clip k belongs to rank k % world_size; `batch_size` is one rank's.
    """
    first = position + rank
    return range(first, first + batch_size * world_size, world_size)


def _hash(seed: int, stream: int, high: int, low: _Words) -> _Words:
    """64 random-looking bits for (`high`, `low`), or for each element of `low`.

    Each word is absorbed by SplitMix64's finaliser (Steele, Lea, Flood 2014), a bijection with
    full avalanche; numpy's own generators promise no stable streams across versions.
    """
    state = 0
    for word in (seed, stream, high):
        state = _mix((state + word) & _U64_MAX)
    return _mix((state + low) & _U64_MAX)


def _mix(x: _Words) -> _Words:
    # The masks do for Python's integers what uint64 arrays do by themselves.
    x = (x + 0x9E3779B97F4A7C15) & _U64_MAX
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _U64_MAX
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _U64_MAX
    return x ^ (x >> 31)
