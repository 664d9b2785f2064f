"""Opening a video file, and choosing which of its streams is the video.

Everything that opens a video file in this project opens it here, so that no file name and no
file's content can make libav read anything but that one local file.
"""

import errno
import stat
from pathlib import Path
from typing import Any

import av
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
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


class RejectedError(Exception):
    """The file cannot be trained on; the message is the reason, without the file's name."""


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
            reason = f"cannot be read: {error.strerror}"
            if error.errno == errno.EIO:  # what Matroska's demuxer says of a file that is cut
                reason += ", or it ends within its header"
            raise RejectedError(reason) from None
        raise RejectedError("not a video (no mp4, mov, matroska, webm or avi header)") from None
    except OSError as error:
        raise RejectedError(f"cannot be read: {error.strerror}") from None


def films(container: InputContainer) -> list[VideoStream]:
    """The video streams that are not pictures attached to the file, such as a cover."""
    return [
        stream
        for stream in container.streams.video
        if not stream.disposition & (Disposition.attached_pic | Disposition.timed_thumbnails)
    ]


def video_stream(container: InputContainer) -> VideoStream:
    """The container's main video stream, set to fail on damage. Raises RejectedError.

    libav's choice, but never a cover: then the first that is none.
    """
    candidates = films(container)
    if not candidates:
        raise RejectedError("has no video stream")
    best = container.streams.best("video")
    stream = next((each for each in candidates if each == best), candidates[0])
    if stream.codec_context is None:
        raise RejectedError("has a codec that cannot be decoded")
    if stream.width * stream.height > MAX_FRAME_PIXELS:
        raise RejectedError(
            f"frames of {stream.width} x {stream.height} pixels: more than {MAX_FRAME_PIXELS}"
        )
    stream.codec_context.options = _STRICT
    stream.codec_context.thread_count = 1  # files are decoded in parallel
    stream.codec_context.flags |= av.codec.context.Flags.copy_opaque
    return stream


def number_packet(packet: Packet, number: int) -> None:
    """Let the frames that are decoded from a packet tell its number."""
    # An object of its own: PyAV to 18 keeps them by identity, and equal integers are one object.
    packet.opaque = (number,)


def packet_number(frame: VideoFrame) -> int | None:
    """Which packet a frame was decoded from; None if the decoder does not tell."""
    return frame.opaque[0] if isinstance(frame.opaque, tuple) else None
