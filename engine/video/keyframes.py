"""The places in a file where decoding can start, so that a window costs the same in a long file.

A table of them is made once, after a full decode, and kept in the index. It holds a keyframe if
decoding from it gives, from the keyframe's own picture on, exactly what the full decode gave: that
was tried. The table knows frames by their number in the order shown, never by a timestamp, because
AVI has none for pictures and other containers round theirs. It knows keyframes by their place in
the file, because a demuxer that is led by a wrong index gives whatever it finds the time that was
sought.
"""

import base64
import functools
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TypeVar

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from engine.video.colour import rgb
from engine.video.containers import number_packet, open_video, packet_number, video_stream

NUM_COMPARED = 4
"""Pictures from a keyframe on that must be the full decode's. One that refers to what came before
the keyframe shows early: whatever follows refers to it."""
_MOST_TRIED = 16
_LUMA_OF_BYTES = re.compile(r"yuvj?4\d\dp|gray")
_COLUMNS = 3
_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class Start:
    """A keyframe to start from."""

    number: int
    """The number of its picture in the order shown."""
    seek: int
    """The time to seek to, in ticks of the stream's clock."""
    position: int
    """Where the keyframe's packet begins, in bytes: a demuxer that stands elsewhere after seeking
    has not found it."""


class KeyframeTable:
    """Starts in the order of their numbers."""

    def __init__(self, starts: NDArray[np.int64]) -> None:
        self._starts = starts

    def before(self, number: int) -> Start | None:
        """The last start at or before picture `number`; None where that is the file's beginning."""
        place = int(np.searchsorted(self._starts[:, 0], number, side="right")) - 1
        return self._start(place) if place >= 0 else None

    def at(self, numbers: range) -> list[Start]:
        """The starts that are these pictures; empty where one of them is none."""
        places = np.searchsorted(self._starts[:, 0], np.array(numbers))
        if places[-1] == len(self._starts) or (self._starts[places, 0] != numbers).any():
            return []
        return [self._start(place) for place in places]

    def _start(self, place: int) -> Start:
        return Start(*self._starts[place].tolist())

    def __len__(self) -> int:
        return len(self._starts)


def pack(starts: Sequence[Start]) -> str:
    """Starts as text for the index: differences, compressed. Some four bytes per keyframe."""
    if not starts:
        return ""
    rows = [(start.number, start.seek, start.position) for start in starts]
    table = np.array(rows, dtype="<i8")
    steps = np.diff(table, axis=0, prepend=np.zeros((1, _COLUMNS), dtype="<i8"))
    return base64.b64encode(zlib.compress(steps.T.tobytes(), 9)).decode()


@functools.lru_cache(maxsize=4096)
def unpack(text: str) -> KeyframeTable:
    """The inverse of `pack`. Raises ValueError for what `pack` did not write."""
    if not text:
        return KeyframeTable(np.empty((0, _COLUMNS), dtype="<i8"))
    try:
        steps = np.frombuffer(zlib.decompress(base64.b64decode(text, validate=True)), "<i8")
        table = np.cumsum(steps.reshape(_COLUMNS, -1), axis=1).T
    except (ValueError, zlib.error):
        raise ValueError("its table of keyframes is damaged") from None
    return KeyframeTable(table)


def frames_from(
    container: InputContainer, stream: VideoStream, start: Start
) -> Iterator[VideoFrame]:
    """The pictures shown from a start's on. Empty where the demuxer does not come to its keyframe.

    Raises FFmpegError on damage.
    """
    container.seek(start.seek, stream=stream, backward=True)
    shown = False
    for number, packet in enumerate(container.demux(stream)):
        if number == 0 and packet.pos != start.position:
            return
        number_packet(packet, number)
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            if shown:
                raise
            continue  # pictures shown before the keyframe refer to earlier ones
        for frame in frames:
            assert isinstance(frame, VideoFrame)
            shown = shown or (packet_number(frame) == 0 and frame.key_frame)
            if shown:
                yield frame


def intra_frames(
    container: InputContainer, stream: VideoStream, starts: Sequence[Start]
) -> Iterator[VideoFrame]:
    """The pictures of these starts, in their order; no other is decoded.

    For codecs whose every packet is one picture by itself. Fewer where the demuxer does not come
    to one of them. Raises FFmpegError on damage.
    """
    wanted = {start.number: start for start in starts}
    container.seek(starts[0].seek, stream=stream, backward=True)
    for number, packet in enumerate(container.demux(stream), starts[0].number):
        if number not in wanted:
            continue
        if packet.pos != wanted[number].position:
            return
        yield from packet.decode()
        if number == starts[-1].number:
            return


def checksum(frame: VideoFrame) -> int:
    """Of the picture as decoded: of its luma where that has a plane of bytes, else of its RGB."""
    if not _LUMA_OF_BYTES.fullmatch(frame.format.name):
        return zlib.crc32(rgb(frame).tobytes())
    luma = frame.planes[0]
    # Negative where the picture lies in memory upside down.
    line_bytes = abs(luma.line_size)
    rows = np.frombuffer(luma, np.uint8).reshape(-1, line_bytes)  # type: ignore[call-overload]
    return zlib.crc32(rows[: frame.height, : frame.width].tobytes())


@dataclass(frozen=True, slots=True)
class Keyframe:
    """A keyframe that a full decode met."""

    number: int
    """Of its picture, in the order shown."""
    position: int
    """Of its packet, in bytes from the file's beginning."""
    pts: int | None
    dts: int | None
    """The packet's times in ticks of the stream's clock."""


def find_starts(
    path: Path, keyframes: Sequence[Keyframe], checksums: dict[int, int], *, intra_only: bool
) -> list[Start]:
    """Those of a file's keyframes that are starts.

    `checksums` has the pictures that are compared: from each keyframe's on, NUM_COMPARED of them.
    Where every picture is a keyframe (`intra_only`), some are tried, and speak for all.
    """
    inner = [keyframe for keyframe in keyframes if keyframe.number]
    if intra_only and len(inner) > _MOST_TRIED:
        return _all_alike(path, inner, checksums) or find_starts(
            path, _spread(inner), checksums, intra_only=True
        )
    with open_video(path) as container:
        stream = video_stream(container)
        starts = [
            start
            for keyframe, later in zip_longest(inner, inner[1:])
            if (start := _reached(container, stream, keyframe, later))
            and _same_pictures(container, stream, start, checksums)
        ]
    # So far one container was rewound time and again. A window's is opened for it.
    if all(_holds(path, start, checksums) for start in _spread(starts)):
        return starts
    return [start for start in starts if _holds(path, start, checksums)]


def _all_alike(
    path: Path, keyframes: list[Keyframe], checksums: dict[int, int]
) -> list[Start] | None:
    """All keyframes as starts, by the times that their packets had; None if a few do not hold."""
    by_dts = keyframes[0].dts is not None
    starts = []
    for keyframe in keyframes:
        seek = keyframe.dts if by_dts else keyframe.pts
        if seek is None:
            return None
        starts.append(Start(keyframe.number, seek, keyframe.position))
    return starts if all(_holds(path, start, checksums) for start in _spread(starts)) else None


def _spread(items: Sequence[_Item]) -> list[_Item]:
    places = np.linspace(0, len(items) - 1, min(len(items), _MOST_TRIED)).astype(int)
    return [items[place] for place in places]


def _reached(
    container: InputContainer, stream: VideoStream, keyframe: Keyframe, later: Keyframe | None
) -> Start | None:
    """The start at a keyframe, if seeking leads there.

    In an mp4 with an edit list the time of the next keyframe may lead to this one.
    """
    for seek in (keyframe.dts, keyframe.pts, None if later is None else later.dts):
        if seek is None:
            continue
        try:
            container.seek(seek, stream=stream, backward=True)
            packet: Packet = next(container.demux(stream))
        except (av.error.FFmpegError, StopIteration):
            continue
        if packet.pos == keyframe.position:
            return Start(keyframe.number, seek, keyframe.position)
    return None


def _holds(path: Path, start: Start, checksums: dict[int, int]) -> bool:
    with open_video(path) as container:
        return _same_pictures(container, video_stream(container), start, checksums)


def _same_pictures(
    container: InputContainer, stream: VideoStream, start: Start, checksums: dict[int, int]
) -> bool:
    """Whether decoding from a start gives the full decode's pictures."""
    wanted = [n for n in range(start.number, start.number + NUM_COMPARED) if n in checksums]
    found = []
    try:
        for frame in frames_from(container, stream, start):
            found.append(checksum(frame))
            if len(found) == len(wanted):
                break
    except av.error.FFmpegError:
        return False
    return found == [checksums[n] for n in wanted]
