"""A small copy of one video: encoded, decoded again in full, and compared with its source.

Frame n of the copy is frame n of the source, resized and turned as the loader does it. Only single
frames are held, so a video may be of any length. Shapes: H x W pixels, C = 3 (RGB).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path

import av
import numpy as np
import torch
from av.video.frame import VideoFrame
from numpy.typing import NDArray
from torch.nn.functional import avg_pool2d

from engine.errors import UserError
from engine.video.colour import rgb
from engine.video.containers import RejectedError, open_video, video_stream
from engine.video.encoding import ENCODINGS, REPEATABLE, Codec, add_stream, tag_colours, to_yuv
from engine.video.geometry import upright
from engine.video.index import VideoEntry
from engine.video.inspection import VideoFacts, inspect_video

MOST_LEVELS = 4.0
"""Of 255, the mean over a frame of how far its means of 4 x 4 pixels may be from the source's.

Twice what was measured of noise, the worst there is: means leave out what 4:2:0 loses. A frame in
another's place is 3 to 85 off, wrong colours 5 to 30."""
_MEANS_OF = 4  # pixels
# Frame rates are some number over 1 or 1001; the index has them rounded.
_LARGEST_DENOMINATOR = 1001


def start_worker() -> None:
    """For a process among as many as there are cores."""
    torch.set_num_threads(1)


def copy_video(source: Path, entry: VideoEntry, copy: Path, codec: Codec, size: int) -> VideoFacts:
    """Write the file `copy` of a video, and tell what a full decode of it found.

    The copy's shorter side is `size` pixels, or the source's where that is less; its pixels are
    square and its frames upright. Raises RejectedError, the reason, when there can be no true copy,
    and UserError when the file cannot be written.
    """
    size = min(size, entry.width, entry.height)
    try:
        _encode(source, entry, copy, codec, size)
    except av.error.FFmpegError as error:
        reason = error.strerror or "unknown error"
        if isinstance(error, OSError):  # a full disk; what an encoder raises is none
            raise UserError(f"cannot write {copy.parent}: {reason}") from None
        raise RejectedError(f"cannot be encoded: {reason.lower()}") from None
    try:
        facts = inspect_video(copy)
    except RejectedError as rejected:
        raise RejectedError(f"its copy is unusable: {rejected}") from None
    if facts.num_frames != entry.num_frames:
        raise RejectedError(f"its copy has {facts.num_frames} frames, not {entry.num_frames}")
    _compare(source, entry, copy, size)
    return facts


def _encode(source: Path, entry: VideoEntry, copy: Path, codec: Codec, size: int) -> None:
    rate = Fraction(entry.fps).limit_denominator(_LARGEST_DENOMINATOR)
    container_format = {"mkv": "matroska"}.get(suffix := ENCODINGS[codec].suffix, suffix)
    stream = None
    with (
        _frames(source) as frames,
        av.open(str(copy), "w", format=container_format, options=REPEATABLE) as container,
    ):
        for number, frame in enumerate(frames):
            frame_HWC = _resized(frame, entry, size)
            if stream is None:
                height, width = frame_HWC.shape[:2]
                stream = add_stream(container, codec, width, height, rate)
                tag_colours(stream, codec, frame)
            picture = to_yuv(frame_HWC, codec)
            picture.pts, picture.time_base = number, 1 / rate
            container.mux(stream.encode(picture))
        if stream is None:
            raise RejectedError("has changed since it was indexed: it has no frames")
        container.mux(stream.encode())


def _compare(source: Path, entry: VideoEntry, copy: Path, size: int) -> None:
    """RejectedError where a frame of the copy is not that of the source."""
    with _frames(source) as frames, _frames(copy) as copied:
        for number, (frame, other) in enumerate(zip_longest(frames, copied)):
            if frame is None or other is None:
                raise RejectedError(f"has changed while it was copied, at frame {number}")
            levels = _difference(_resized(frame, entry, size), rgb(other))
            if levels > MOST_LEVELS:
                raise RejectedError(f"its copy is {levels:.0f} levels off at frame {number}")


def _difference(one_HWC: NDArray[np.uint8], other_HWC: NDArray[np.uint8]) -> float:
    if one_HWC.shape != other_HWC.shape:
        raise RejectedError(f"its copy's frames are {other_HWC.shape}, not {one_HWC.shape}")
    difference_HWC = torch.from_numpy(one_HWC).float() - torch.from_numpy(other_HWC).float()
    means = avg_pool2d(difference_HWC.permute(2, 0, 1), _MEANS_OF, ceil_mode=True)
    return float(means.abs().mean())


def _resized(frame: VideoFrame, entry: VideoEntry, size: int) -> NDArray[np.uint8]:
    frame_CHW = upright(rgb(frame)[None], entry, size)[0]
    return frame_CHW.permute(1, 2, 0).contiguous().numpy()


@contextmanager
def _frames(path: Path) -> Iterator[Iterator[VideoFrame]]:
    """All frames in the order shown; damage raises RejectedError."""
    with open_video(path) as container:
        yield _decoded(container.decode(video_stream(container)))


def _decoded(frames: Iterator[VideoFrame]) -> Iterator[VideoFrame]:
    try:
        yield from frames
    except av.error.FFmpegError as error:
        raise RejectedError(f"damaged: {(error.strerror or 'undecodable').lower()}") from None
