"""What the two streams of clips share: both take clip requests and give uint8 clips of one size.

    requests -> read file -> decode the window -> resize -> turn -> crop -> mirror

The requests come from our sampler, so a stream has no state that a checkpoint would have to hold.
What replaces a clip whose file has failed depends on the clip's number and on which files can be
read, not on when threads come to them. Clips are [B, T, H, W, C], C = 3 (RGB), H = W = resolution.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import UserError
from engine.video.containers import RejectedError
from engine.video.decoding import decode_window
from engine.video.folders import NOT_INDEXED, leads_out
from engine.video.index import VideoIndex
from engine.video.keyframes import unpack
from engine.video.sampler import ClipRequest

_Read = TypeVar("_Read")
Decoder = Literal["dali-cpu", "dali-gpu", "pyav"]
# Batches in preparation ahead of the one in use.
PREFETCHED_BATCHES = 2


@dataclass(frozen=True)
class StreamSettings:
    """What is cut from videos, and where it goes."""

    batch_size: int
    num_frames: int
    frame_stride: int
    resolution: int
    device: torch.device
    num_threads: int


class FailedFileError(UserError):
    """A file of the index that cannot be read any more, or is no longer the one indexed."""

    def __init__(self, video: int, problem: str) -> None:
        super().__init__(f"{problem}; run engine/prepare.py again")
        self.video, self.problem = video, problem
        """Its place in the index, and what is wrong, with the file's name."""


class Readable(NamedTuple, Generic[_Read]):
    """A request that can be read, what was read, and the failures of what it replaces."""

    request: ClipRequest
    read: _Read
    failures: list[FailedFileError]


class DecodedClips(NamedTuple):
    """A batch as a stream gives it."""

    requests: list[ClipRequest]
    """What the clips are: a clip whose file has failed is another video's, under its number."""
    clips_BTHWC: Tensor
    """uint8, on the device."""
    failures: list[FailedFileError]
    """Why clips were replaced."""
    num_replaced: int

    @staticmethod
    def of(found: Sequence[Readable[Any]], clips_BTHWC: Tensor) -> "DecodedClips":
        """The batch of what was found readable."""
        return DecodedClips(
            [each.request for each in found],
            clips_BTHWC,
            [failed for each in found for failed in each.failures],
            sum(bool(each.failures) for each in found),
        )


class ClipStream(Protocol):
    """Decoded batches for a stream of request batches, in order."""

    def __next__(self) -> DecodedClips:
        """The next batch.

        Raises FailedFileError where a file has failed and nothing may replace it, and UserError
        where none of the replacements can be read. The stream is of no use then.
        """
        ...

    def close(self) -> None:
        """Stop decoding."""
        ...


def _none(number: int) -> Iterable[ClipRequest]:
    return ()


class IndexedFiles:
    """The files of an index, checked to be those that were indexed.

    `replacements` gives, for a clip's number, the requests to try where its file has failed.
    """

    def __init__(
        self, index: VideoIndex, replacements: Callable[[int], Iterable[ClipRequest]] = _none
    ) -> None:
        self.index = index
        self._real_root = os.path.realpath(index.root)
        self._replacements = replacements
        self._given_up: dict[int, str] = {}
        self._same_content: dict[int, tuple[int, int]] = {}
        """The size and the time of a file whose content was compared."""

    def first_readable(
        self, request: ClipRequest, read: Callable[[ClipRequest], _Read]
    ) -> Readable[_Read]:
        """Read a clip, or the first of its replacements that can be. Raises as a stream does."""
        failures: list[FailedFileError] = []
        for tried in chain([request], self._replacements(request.number)):
            try:
                return Readable(tried, read(tried), failures)
            except FailedFileError as failed:
                failures.append(failed)
        if len(failures) == 1:
            raise failures[0]
        raise UserError(f"none of {len(failures)} videos can be read, e.g. {failures[0].problem}")

    def give_up(self, failed: FailedFileError) -> None:
        """Fail this file from now on: a decoder died of it, though size and time are the old."""
        self._given_up[failed.video] = failed.problem

    def check(self, video: int) -> None:
        """Refuse a file that is not the one indexed: what libav makes of it was never judged.

        Size and time tell at once; a copied data set has new times, so there the hash decides.
        Raises FailedFileError.
        """
        if video in self._given_up:
            raise FailedFileError(video, self._given_up[video])
        entry, path = self.index.entries[video], self.index.path(video)
        if not self.index.follow_symlinks and leads_out(path, self._real_root):
            raise FailedFileError(video, f"{path} is {NOT_INDEXED}")
        try:
            status = path.stat()
            stamp = status.st_size, status.st_mtime_ns
            same = status.st_size == entry.size_bytes
            if same and stamp[1] != entry.modified_ns and self._same_content.get(video) != stamp:
                with path.open("rb") as file:
                    same = hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256
                if same:
                    self._same_content[video] = stamp
        except OSError as error:
            raise FailedFileError(video, f"cannot read {path}: {error.strerror}") from None
        if not same:
            raise FailedFileError(video, f"{path} has changed since it was indexed")

    def window(
        self, video: int, *, start_frame: int, num_frames: int, frame_stride: int
    ) -> NDArray[np.uint8]:
        """Frames as coded, uint8 [T, H, W, C]. Raises FailedFileError."""
        entry, path = self.index.entries[video], self.index.path(video)
        try:
            return decode_window(
                path,
                start_frame=start_frame,
                num_frames=num_frames,
                frame_stride=frame_stride,
                video_frames=entry.num_frames,
                keyframes=unpack(entry.keyframes),
            )
        except RejectedError as rejected:
            raise FailedFileError(video, f"cannot decode {path}: {rejected}") from None
