"""Judging one video file: decode all of it, and say what it holds or why it cannot be used."""

import contextlib
import hashlib
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import av
import av.logging
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from engine.video.colour import Colour, colour_of
from engine.video.containers import (
    MAX_FRAME_PIXELS,
    RejectedError,
    films,
    number_packet,
    open_video,
    packet_number,
    video_stream,
)
from engine.video.keyframes import NUM_COMPARED, Keyframe, checksum, find_starts, pack
from engine.video.truncation import check_whole

# The linear part of a display matrix, 16.16 fixed point, row by row -> degrees counterclockwise.
_ONE = 1 << 16
_ROTATIONS = {
    (_ONE, 0, 0, _ONE): 0,
    (0, -_ONE, _ONE, 0): 90,
    (-_ONE, 0, 0, -_ONE): 180,
    (0, _ONE, -_ONE, 0): 270,
}
_MOST_STRETCHED = 10  # times; a pixel's sides
# When a packet is lost, decoders go on from whatever picture they have. These decoders say so, as
# an error; H.264's also in a message that is none.
_SAY_WHAT_IS_LOST = ("h264", "hevc", "ffv1", "libdav1d")
_GAP = "Frame num gap"
# Streams in layers skip frame numbers for a larger share of their pictures than this.
_MOST_GAPS = 0.25
# Other decoders cannot know what is lost. There a gap in the pictures' times tells, if this share
# of the times is regular, and if it is shorter than a pause.
_REGULAR = 0.95
_SECONDS_OF_A_PAUSE = 1


@dataclass(frozen=True, slots=True)
class VideoFacts:
    """What a full decode found."""

    num_frames: int
    fps: float
    """Frames per second of the times that the frames have, which headers may contradict."""
    width: int
    """As displayed, with square pixels and after the rotation."""
    height: int
    rotation: int
    """Degrees counterclockwise from the coded frames, which decoders give, to the displayed ones:
    0, 90, 180 or 270. Phones and dashboard cameras (BDD100K) turn the frame by metadata only."""
    sample_aspect_ratio: str
    """A coded pixel's width to its height, "64:45"; "1:1" where the file is silent."""
    codec: str
    """libav's name: h264, vp9, mjpeg, ..."""
    pixel_format: str
    """libav's name: yuv420p, yuvj420p, ..."""
    matrix: str
    """These four as `engine.video.colour` names them."""
    range: str
    primaries: str
    transfer: str
    times_number_frames: bool
    """Whether counting packets in the order of their times counts the frames that are shown, in a
    file with one video stream. DALI counts so."""
    keyframes: str
    """Where decoding can start: `engine.video.keyframes.unpack`."""
    sha256: str


def inspect_video(path: Path) -> VideoFacts:
    """Decode every frame of `path`. Raises RejectedError with the reason."""
    try:
        container = open_video(path)
    except RejectedError:
        if path.is_file():
            check_whole(path)  # an mp4 that was cut has lost the header, which comes last
        raise
    with container:
        stream = video_stream(container)
        check_whole(path)
        pictures = _decode_all(container, stream)
        facts = _facts(container, stream, pictures)
    starts = find_starts(
        path, pictures.keyframes(), pictures.checksums, intra_only=pictures.intra_only
    )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return VideoFacts(**facts, keyframes=pack(starts), sha256=digest)


@dataclass
class _Packet:
    position: int
    pts: int | None
    dts: int | None
    is_keyframe: bool
    is_shown: bool


class _Look(NamedTuple):
    """What all pictures of a usable file have in common; named as in "frame size changes"."""

    frame_size: tuple[int, int]
    pixel_format: str
    orientation: int
    colour_description: Colour
    pixel_shape: Fraction | None


@dataclass
class _Pictures:
    """What a full decode gave, in the order shown."""

    packets: list[_Packet] = field(default_factory=list)
    origins: list[int | None] = field(default_factory=list)
    """The number of the packet of each picture."""
    times: list[int | None] = field(default_factory=list)
    are_key: list[bool] = field(default_factory=list)
    checksums: dict[int, int] = field(default_factory=dict)
    """Of a keyframe's picture and those that follow it."""
    look: _Look | None = None
    """None before the first picture."""

    @property
    def intra_only(self) -> bool:
        return all(packet.is_keyframe for packet in self.packets)

    def keyframes(self) -> list[Keyframe]:
        """Those whose packet and picture are known to belong together, the packet by its place."""
        found = []
        num_at = Counter(packet.position for packet in self.packets)
        for number, (origin, is_key) in enumerate(zip(self.origins, self.are_key, strict=True)):
            packet = None if origin is None else self.packets[origin]
            if not (is_key and packet and packet.is_keyframe):
                continue
            if packet.position >= 0 and num_at[packet.position] == 1:
                found.append(Keyframe(number, packet.position, packet.pts, packet.dts))
        return found


def _decode_all(container: InputContainer, stream: VideoStream) -> _Pictures:
    pictures = _Pictures()
    gaps = []
    try:
        with _messages(stream) as messages:
            for packet in container.demux(stream):
                _add(pictures, packet)
                lost = _check_messages(messages, stream.codec_context.name, len(pictures.times))
                if lost and _is_past_the_first_keyframe(pictures):
                    gaps.append(len(pictures.times))
    except av.error.FFmpegError as error:
        reason = (error.strerror or "undecodable").lower()
        if isinstance(error, av.error.ArgumentError):  # also what libav says of a frame past _LIMIT
            reason += f", or a frame of more than {MAX_FRAME_PIXELS} pixels"
        raise RejectedError(f"damaged after {len(pictures.times)} frames: {reason}") from None
    if not pictures.times:
        raise RejectedError("holds no frames")
    if gaps and len(gaps) < len(pictures.times) * _MOST_GAPS:
        raise RejectedError(f"damaged near frame {gaps[0]}: an earlier one is lost")
    return pictures


def _is_past_the_first_keyframe(pictures: _Pictures) -> bool:
    """Whether the newest packet is shown after the first keyframe: what is not, nobody sees."""
    first = next((packet for packet in pictures.packets if packet.is_keyframe), None)
    newest = pictures.packets[-1]
    if first is None or newest is first:
        return False
    return first.pts is None or newest.pts is None or newest.pts > first.pts


@contextlib.contextmanager
def _messages(stream: VideoStream) -> Iterator[list[tuple[int, str, str]]]:
    """What libav says of damage that it conceals: (level, who, text), as it comes."""
    wanted = av.logging.DEBUG if stream.codec_context.name == "h264" else av.logging.ERROR
    level, skips = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(wanted)
    av.logging.set_skip_repeated(False)  # two files may be damaged alike
    try:
        with av.logging.Capture() as messages:
            yield messages
    finally:
        av.logging.set_level(level)
        av.logging.set_skip_repeated(skips)


def _check_messages(messages: list[tuple[int, str, str]], decoder: str, number: int) -> bool:
    """Whether frame numbers have a gap. Raises RejectedError for an error, and forgets them.

    A demuxer that finds its place again after damage has lost packets, and every one says so.
    """
    has_gap = False
    for level, who, text in messages:
        if level <= av.logging.ERROR and (who != decoder or decoder in _SAY_WHAT_IS_LOST):
            raise RejectedError(f"damaged at frame {number}: {text.strip()}")
        has_gap = has_gap or text.startswith(_GAP)
    messages.clear()
    return has_gap


def _add(pictures: _Pictures, packet: Packet) -> None:
    """Decode one packet. Raises RejectedError for what no clip may hold."""
    number = len(pictures.times)
    if packet.is_corrupt:
        raise RejectedError(f"damaged at frame {number}")
    number_packet(packet, len(pictures.packets))
    if packet.size:
        pictures.packets.append(
            _Packet(
                packet.pos if packet.pos is not None else -1,
                packet.pts,
                packet.dts,
                packet.is_keyframe,
                not packet.is_discard,
            )
        )
    for frame in packet.decode():
        assert isinstance(frame, VideoFrame)
        number = len(pictures.times)
        if frame.is_corrupt:
            raise RejectedError(f"damaged at frame {number}")
        look = _Look(
            (frame.width, frame.height),
            frame.format.name,
            _rotation(frame),
            colour_of(frame),
            packet.stream.codec_context.sample_aspect_ratio,
        )
        if pictures.look is None:
            pictures.look = look
            if not (frame.key_frame or pictures.packets[0].is_keyframe):
                raise RejectedError("starts between keyframes: its first pictures are invented")
        for what, now, before in zip(_Look._fields, look, pictures.look, strict=True):
            if now != before:
                raise RejectedError(f"{what.replace('_', ' ')} changes at frame {number}")
        pictures.origins.append(packet_number(frame))
        pictures.times.append(frame.pts)
        pictures.are_key.append(frame.key_frame)
        if any(pictures.are_key[-NUM_COMPARED:]):
            pictures.checksums[number] = checksum(frame)


def _facts(container: InputContainer, stream: VideoStream, pictures: _Pictures) -> dict[str, Any]:
    _check_for_gaps(stream, pictures)
    look = pictures.look
    assert look is not None, "a file without pictures is rejected"
    aspect = stream.sample_aspect_ratio or Fraction(1)
    if not 1 / _MOST_STRETCHED <= aspect <= _MOST_STRETCHED:
        raise RejectedError(f"has pixels of {aspect.numerator} x {aspect.denominator}")
    width, height = round(look.frame_size[0] * aspect), look.frame_size[1]
    if look.orientation in (90, 270):
        width, height = height, width
    return {
        "num_frames": len(pictures.times),
        "fps": _frames_per_second(stream, pictures.times),
        "width": width,
        "height": height,
        "rotation": look.orientation,
        "sample_aspect_ratio": f"{aspect.numerator}:{aspect.denominator}",
        "codec": stream.codec_context.codec.canonical_name,
        "pixel_format": look.pixel_format,
        **asdict(look.colour_description),
        "times_number_frames": len(films(container)) == len(container.streams.video) == 1
        and _times_number_frames(pictures),
    }


def _frames_per_second(stream: VideoStream, times: list[int | None]) -> float:
    """By the pictures' times; by the header where they agree or there are none, as in AVI."""
    told = [rate for rate in (stream.average_rate, stream.guessed_rate) if rate]
    rate = told[0] if told else None
    first, last, tick = times[0], times[-1], stream.time_base
    if stream.container.format.name != "avi" and tick and first is not None and last is not None:
        num_intervals, span = len(times) - 1, (last - first) * tick
        # Containers round times, and headers know 30000/1001.
        agreeing = [each for each in told if abs(num_intervals / each - span) <= 2 * tick]
        if span > 0:
            rate = agreeing[0] if agreeing else num_intervals / span
    per_second = round(float(rate or 0), 6)
    if per_second <= 0:
        raise RejectedError("has no frame rate")
    return per_second


def _times_number_frames(pictures: _Pictures) -> bool:
    times = [packet.pts for packet in pictures.packets]
    if any(time is None or time < 0 for time in times) or len(set(times)) < len(times):
        return False
    by_time = sorted(range(len(times)), key=lambda number: times[number] or 0)
    return pictures.origins == by_time and all(packet.is_shown for packet in pictures.packets)


def _check_for_gaps(stream: VideoStream, pictures: _Pictures) -> None:
    """Raises RejectedError where a packet seems lost, and later pictures refer to it.

    Only where no decoder would tell, and where the pictures' times are otherwise regular.
    """
    if pictures.intra_only or stream.codec_context.name in _SAY_WHAT_IS_LOST:
        return
    times = [time for time in pictures.times if time is not None]
    intervals = [after - before for before, after in pairwise(times)]
    if len(times) < len(pictures.times) or len(intervals) < 2:
        return
    usual = median(intervals)
    if usual <= 0 or stream.time_base is None:
        return
    # A clock of milliseconds rounds intervals by one tick.
    num_regular = sum(abs(interval - usual) <= 1 for interval in intervals)
    if num_regular < _REGULAR * (len(intervals) - 1):
        return
    for number, interval in enumerate(intervals, start=1):
        is_gap = 1.5 * usual + 1 < interval < _SECONDS_OF_A_PAUSE / stream.time_base
        if is_gap and not pictures.are_key[number]:
            raise RejectedError(
                f"frames are lost ({interval / usual - 1:.0f}) before frame {number}, which refers "
                "to them"
            )


def _rotation(frame: VideoFrame) -> int:
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")  # PyAV's stub does not know this kind
    if matrix is None:
        return 0
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
    if (a, b, c, d) not in _ROTATIONS:
        raise RejectedError("is displayed mirrored, scaled or turned by other than quarter turns")
    return _ROTATIONS[a, b, c, d]
