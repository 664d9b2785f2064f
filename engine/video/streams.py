"""What the two streams of clips share: both take clip requests and give uint8 clips of one size.

    requests -> read file -> decode the window -> resize -> turn -> crop -> mirror

The requests come from our sampler, so a stream has no state that a checkpoint would have to hold.
Clips are [B, T, H, W, C], C = 3 (RGB), H = W = resolution.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import UserError
from engine.video.containers import RejectedError
from engine.video.decoding import decode_window
from engine.video.index import VideoIndex
from engine.video.keyframes import unpack

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


class ClipStream(Protocol):
    """Decoded batches for a stream of request batches, in order."""

    def __next__(self) -> tuple[Tensor, Tensor]:
        """Clip numbers as they came, int64 [B], and clips, uint8 [B, T, H, W, C] on the device.

        Raises UserError that names the file when one cannot be decoded.
        """
        ...

    def close(self) -> None:
        """Stop decoding."""
        ...


class IndexedFiles:
    """The files of an index, checked to be those that were indexed."""

    def __init__(self, index: VideoIndex) -> None:
        self._index = index
        self._same_content: dict[int, tuple[int, int]] = {}
        """The size and the time of a file whose content was compared."""

    def check(self, video: int) -> None:
        """Refuse a file that is not the one indexed: what libav makes of it was never judged.

        Size and time tell at once; a copied data set has new times, so there the hash decides.
        Raises UserError.
        """
        entry, path = self._index.entries[video], self._index.path(video)
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
            raise UserError(
                f"cannot read {path}: {error.strerror}; run engine/prepare.py again"
            ) from None
        if not same:
            raise UserError(f"{path} has changed since it was indexed; run engine/prepare.py again")

    def window(
        self, video: int, *, start_frame: int, num_frames: int, frame_stride: int
    ) -> NDArray[np.uint8]:
        """Frames as coded, uint8 [T, H, W, C]. Raises UserError that names the file."""
        entry, path = self._index.entries[video], self._index.path(video)
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
            raise UserError(
                f"cannot decode {path}: {rejected}; run engine/prepare.py again"
            ) from None
