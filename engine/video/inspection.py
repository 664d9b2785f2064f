"""Judging one video file: decode all of it, and say what it holds or why it cannot be used.

Everything that opens a video file in this project opens it here, so that no file name and no
file's content can make libav read anything but that one local file.
"""

import hashlib
import stat
import struct
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

# Without the whitelists a text file that begins with "ffconcat" opens the files it lists, and a
# playlist or an odd file name opens a network connection.
_CONTAINER_OPTIONS = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi",
}
MAX_FRAME_PIXELS = 8192 * 4320
"""8K, the largest common format: 100 MB as RGB. A larger frame is a mistake or an attack."""
_LIMIT = {"max_pixels": str(MAX_FRAME_PIXELS)}
# PyAV to 18 stops at a tag that is not UTF-8 unless told not to; from 19 on it never does.
_ANY_TAGS: dict[str, Any] = (
    {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
)
# By default libav conceals damage: it would hand us invented pixels.
_STRICT = {"err_detect": "crccheck+explode", **_LIMIT}
# A stream may end this much before its header says: encoders round the last frame's duration.
_DURATION_TOLERANCE = 0.1
# The linear part of a display matrix, 16.16 fixed point, row by row -> degrees counterclockwise.
_ONE = 1 << 16
_ROTATIONS = {
    (_ONE, 0, 0, _ONE): 0,
    (0, -_ONE, _ONE, 0): 90,
    (-_ONE, 0, 0, -_ONE): 180,
    (0, _ONE, -_ONE, 0): 270,
}


class RejectedError(Exception):
    """The file cannot be trained on; the message is the reason, without the file's name."""


@dataclass(frozen=True, slots=True)
class VideoFacts:
    """What a full decode found."""

    num_frames: int
    fps: float
    width: int
    """As displayed, after the rotation."""
    height: int
    rotation: int
    """Degrees counterclockwise from the coded frames, which decoders give, to the displayed ones:
    0, 90, 180 or 270. Phones and dashboard cameras (BDD100K) turn the frame by metadata only."""
    codec: str
    """libav's name: h264, vp9, mjpeg, ..."""
    pixel_format: str
    """libav's name: yuv420p, yuvj420p, ..."""
    sha256: str


def open_video(path: Path) -> InputContainer:
    """Open a local video file, and nothing else. Raises RejectedError."""
    # Absolute, so that a name like "http:x.mp4" is a path; regular, because a pipe would block.
    path = path.absolute()
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise RejectedError("not a regular file")
        return av.open(str(path), options=_CONTAINER_OPTIONS | _LIMIT, **_ANY_TAGS)
    except av.error.FFmpegError as error:
        if isinstance(error, OSError) and not isinstance(error, av.error.InvalidDataError):
            raise RejectedError(f"cannot be read: {error.strerror}") from None
        raise RejectedError("not a video (no mp4, mov, matroska, webm or avi header)") from None
    except OSError as error:
        raise RejectedError(f"cannot be read: {error.strerror}") from None


def video_stream(container: InputContainer, *, num_threads: int = 1) -> VideoStream:
    """The container's main video stream, set to fail on damage. Raises RejectedError."""
    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream):
        raise RejectedError("has no video stream")
    if stream.codec_context is None:
        raise RejectedError("has a codec that cannot be decoded")
    if stream.width * stream.height > MAX_FRAME_PIXELS:
        raise RejectedError(
            f"frames of {stream.width} x {stream.height} pixels: more than {MAX_FRAME_PIXELS}"
        )
    stream.codec_context.options = _STRICT
    stream.codec_context.thread_count = num_threads
    return stream


def inspect_video(path: Path) -> VideoFacts:
    """Decode every frame of `path`. Raises RejectedError with the reason."""
    with open_video(path) as container:
        stream = video_stream(container)
        facts = _decode_all(container, stream)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return VideoFacts(**facts, sha256=digest)


def _decode_all(container: InputContainer, stream: VideoStream) -> dict:
    num_frames = 0
    size, pixel_format, rotation = None, "", None
    end_seconds = Fraction(0)
    try:
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise RejectedError(f"damaged at frame {num_frames}")
            if packet.pts is not None and packet.time_base is not None:
                end = (packet.pts + (packet.duration or 0)) * packet.time_base
                end_seconds = max(end_seconds, end)
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise RejectedError(f"damaged at frame {num_frames}")
                if size not in (None, (frame.width, frame.height)):
                    raise RejectedError(f"frame size changes at frame {num_frames}")
                if rotation not in (None, _rotation(frame)):
                    raise RejectedError(f"orientation changes at frame {num_frames}")
                size, pixel_format = (frame.width, frame.height), frame.format.name
                rotation = _rotation(frame)
                num_frames += 1
    except av.error.FFmpegError as error:
        reason = (error.strerror or "undecodable").lower()
        if isinstance(error, av.error.ArgumentError):  # also what libav says of a frame past _LIMIT
            reason += f", or a frame of more than {MAX_FRAME_PIXELS} pixels"
        raise RejectedError(f"damaged after {num_frames} frames: {reason}") from None
    if size is None or rotation is None:
        raise RejectedError("holds no frames")
    # Durations, not the header's frame count: an edit list rightly hides some frames of a clip that
    # was cut without re-encoding.
    duration = _header_duration(container, stream)
    if duration is not None and end_seconds < duration * (1 - _DURATION_TOLERANCE):
        raise RejectedError(f"truncated: {float(end_seconds):.1f} of {float(duration):.1f} seconds")
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise RejectedError("has no frame rate")
    width, height = size if rotation in (0, 180) else reversed(size)
    return {
        "num_frames": num_frames,
        "fps": round(float(rate), 6),
        "width": width,
        "height": height,
        "rotation": rotation,
        "codec": stream.codec_context.codec.canonical_name,
        "pixel_format": pixel_format,
    }


def _rotation(frame: VideoFrame) -> int:
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")  # PyAV's stub does not know this kind
    if matrix is None:
        return 0
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
    if (a, b, c, d) not in _ROTATIONS:
        raise RejectedError("is displayed mirrored, scaled or turned by other than quarter turns")
    return _ROTATIONS[a, b, c, d]


def _header_duration(container: InputContainer, stream: VideoStream) -> Fraction | None:
    """Where the header says the stream's last frame ends, on the packets' clock; None if unsaid."""
    if stream.duration is not None and stream.time_base is not None:
        return ((stream.start_time or 0) + stream.duration) * stream.time_base
    # Matroska knows only the file's duration, which may be that of a longer sound track.
    if container.duration is not None and len(container.streams) == 1:
        return Fraction(container.duration, av.time_base)
    return None
