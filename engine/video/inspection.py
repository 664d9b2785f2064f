"""Judging one video file: decode all of it, and say what it holds or why it cannot be used.

Everything that opens a video file in this project opens it here, so that no file name and no
file's content can make libav read anything but that one local file.
"""

import hashlib
import stat
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
from av.container import InputContainer
from av.video.stream import VideoStream

# Without the whitelists a text file that begins with "ffconcat" opens the files it lists, and a
# playlist or an odd file name opens a network connection.
_CONTAINER_OPTIONS = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi",
}
# By default libav conceals damage: it would hand us invented pixels.
_STRICT = {"err_detect": "crccheck+explode"}
# A stream may end this much before its header says: encoders round the last frame's duration.
_DURATION_TOLERANCE = 0.1


class RejectedError(Exception):
    """The file cannot be trained on; the message is the reason, without the file's name."""


@dataclass(frozen=True, slots=True)
class VideoFacts:
    """What a full decode found."""

    num_frames: int
    fps: float
    width: int
    height: int
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
        return av.open(str(path), options=_CONTAINER_OPTIONS, metadata_errors="replace")
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
    size, pixel_format = None, ""
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
                size, pixel_format = (frame.width, frame.height), frame.format.name
                num_frames += 1
    except av.error.FFmpegError as error:
        reason = (error.strerror or "undecodable").lower()
        raise RejectedError(f"damaged after {num_frames} frames: {reason}") from None
    if size is None:
        raise RejectedError("holds no frames")
    # Durations, not the header's frame count: an edit list rightly hides some frames of a clip that
    # was cut without re-encoding.
    duration = _header_duration(container, stream)
    if duration is not None and end_seconds < duration * (1 - _DURATION_TOLERANCE):
        raise RejectedError(f"truncated: {float(end_seconds):.1f} of {float(duration):.1f} seconds")
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise RejectedError("has no frame rate")
    return {
        "num_frames": num_frames,
        "fps": round(float(rate), 6),
        "width": size[0],
        "height": size[1],
        "codec": stream.codec_context.codec.canonical_name,
        "pixel_format": pixel_format,
    }


def _header_duration(container: InputContainer, stream: VideoStream) -> Fraction | None:
    """Where the header says the stream's last frame ends, on the packets' clock; None if unsaid."""
    if stream.duration is not None and stream.time_base is not None:
        return ((stream.start_time or 0) + stream.duration) * stream.time_base
    # Matroska knows only the file's duration, which may be that of a longer sound track.
    if container.duration is not None and len(container.streams) == 1:
        return Fraction(container.duration, av.time_base)
    return None
