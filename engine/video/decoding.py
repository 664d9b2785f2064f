"""Decoding one window of a video with PyAV, for codecs that DALI cannot decode on the CPU.

Frame n is the n-th frame that a full decode shows, as in the index; never "the frame near second
s". Shapes: T frames, H x W pixels, C = 3 (RGB).
"""

from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from engine.video.inspection import RejectedError, open_video, video_stream


def decode_window(
    path: Path, *, start_frame: int, num_frames: int, frame_stride: int, video_frames: int
) -> NDArray[np.uint8]:
    """Frames start, start + stride, ... of a video of `video_frames` frames, uint8 [T, H, W, C].

    Decoding starts at the last keyframe before the window where the file's timestamps identify
    every frame, else at the beginning. Raises RejectedError when the file is damaged or shorter.
    """
    numbers = range(start_frame, start_frame + num_frames * frame_stride, frame_stride)
    with open_video(path) as container:
        stream = video_stream(container)
        try:
            times = _frame_times(container, stream)
            frames = None
            if len(times) == video_frames > numbers[-1]:
                frames = _decode_from_keyframe(container, stream, [times[n] for n in numbers])
            if frames is None:
                frames = _decode_from_start(path, numbers)
        except av.error.FFmpegError as error:
            raise RejectedError(f"damaged: {(error.strerror or 'undecodable').lower()}") from None
    return np.stack(frames)


def _frame_times(container: InputContainer, stream: VideoStream) -> list[int]:
    """Presentation times of all shown frames, in order; empty when they do not identify frames."""
    times = []
    for packet in container.demux(stream):
        if packet.size and not packet.is_discard:
            if packet.pts is None:  # AVI with B-frames knows no presentation times
                return []
            times.append(packet.pts)
    return sorted(times) if len(set(times)) == len(times) else []


def _decode_from_keyframe(
    container: InputContainer, stream: VideoStream, wanted: list[int]
) -> list[NDArray[np.uint8]] | None:
    """The frames at the wanted times; None when decoding cannot start at the keyframe."""
    container.seek(wanted[0], stream=stream, backward=True)
    found: dict[int, NDArray[np.uint8]] = {}
    try:
        for frame in container.decode(stream):
            if frame.pts is None:
                return None
            if frame.pts in wanted:
                found[frame.pts] = _rgb(frame)
            if frame.pts >= wanted[-1]:  # frames are shown in order: nothing wanted comes later
                break
    except av.error.FFmpegError:
        # In an open group of pictures, frames shown before the keyframe refer to earlier ones.
        return None
    return [found[time] for time in wanted] if len(found) == len(wanted) else None


def _decode_from_start(path: Path, numbers: range) -> list[NDArray[np.uint8]]:
    frames = []
    # Opened afresh: rewinding a container does not undo what a seek did to every demuxer.
    with open_video(path) as container:
        for number, frame in enumerate(container.decode(video_stream(container))):
            if number in numbers:
                frames.append(_rgb(frame))
            if number >= numbers[-1]:
                return frames
    raise RejectedError(f"has no frame {numbers[-1]}")


def _rgb(frame: VideoFrame) -> NDArray[np.uint8]:
    return frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
