"""Decoding one window of a video with PyAV.

Frame n is the n-th frame that a full decode shows, as in the index; never "the frame near second
s". Shapes: T frames, H x W pixels as coded, C = 3 (RGB).
"""

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from av.video.frame import VideoFrame
from numpy.typing import NDArray

from engine.video.colour import rgb
from engine.video.containers import RejectedError, open_video, video_stream
from engine.video.keyframes import KeyframeTable, frames_from, intra_frames


def decode_window(
    path: Path,
    *,
    start_frame: int,
    num_frames: int,
    frame_stride: int,
    video_frames: int,
    keyframes: KeyframeTable | None = None,
) -> NDArray[np.uint8]:
    """Frames start, start + stride, ... of a video of `video_frames` frames, uint8 [T, H, W, C].

    Decoding starts at the last of `keyframes` before the window, else at the file's beginning.
    Raises RejectedError when the file is damaged or shorter.
    """
    numbers = range(start_frame, start_frame + num_frames * frame_stride, frame_stride)
    if numbers[-1] >= video_frames:
        raise RejectedError(f"has no frame {numbers[-1]}")
    try:
        found: list[NDArray[np.uint8]] = []
        if keyframes is not None and (start := keyframes.before(start_frame)):
            with open_video(path) as container:
                stream = video_stream(container)
                starts = keyframes.at(numbers) if stream.codec_context.codec.intra_only else []
                if starts:
                    found = [rgb(frame) for frame in intra_frames(container, stream, starts)]
                else:
                    shown = frames_from(container, stream, start)
                    found = _chosen(shown, start.number, numbers)
        if len(found) != num_frames:  # no keyframe, or another libav does not find it
            # Opened afresh: rewinding a container does not undo what a seek did to every demuxer.
            with open_video(path) as container:
                found = _chosen(container.decode(video_stream(container)), 0, numbers)
    except av.error.FFmpegError as error:
        raise RejectedError(f"damaged: {(error.strerror or 'undecodable').lower()}") from None
    if len(found) < num_frames:
        raise RejectedError(f"has no frame {numbers[-1]}")
    return np.stack(found)


def _chosen(
    shown: Iterator[VideoFrame], first_number: int, numbers: range
) -> list[NDArray[np.uint8]]:
    """The frames with the wanted numbers, as RGB; `shown` begins with number `first_number`."""
    found = []
    for number, frame in enumerate(shown, first_number):
        if number in numbers:
            found.append(rgb(frame))
            if number == numbers[-1]:
                break
    return found
