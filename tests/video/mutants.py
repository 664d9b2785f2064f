"""Damaged variants of small valid files, each made from its seed alone.

    python tests/video/mutants.py SEED FOLDER       writes one, to be looked at

Bytes are changed without regard to what they mean, and whole boxes, chunks, elements and packets
are removed, doubled, swapped or taken from another file in such a way that the rest still fits.
"""

import functools
import io
import os
import random
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("SVT_LOG", "1")  # AV1's encoder tells its settings otherwise

import av
import numpy as np
from av.container import InputContainer, OutputContainer
from av.packet import Packet
from encoded_videos import ENCODINGS, write_encoded
from numpy.typing import NDArray

# Not VP8: of a picture that is cut short libav shows what lay in memory, and says nothing. No two
# decodes need agree, and nobody can tell that it is damaged.
BASES = (
    "h264-mp4-gop12-b3",
    "h264-mp4-fragments",
    "h264-mkv-open-gop",
    "h264-avi-gop12-b0",
    "hevc-mp4-closed-gop",
    "mpeg4-avi-packed-gop12",
    "vp9-webm-hidden",
    "av1-mp4",
    "mjpeg-avi",
)
_NUM_FRAMES = 30
_WIDTH = 64  # libx265 writes beyond its buffers for 48

_MP4_PARENTS = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"dinf", b"udta"} | {
    *(b"mvex", b"moof", b"traf")
}
_MP4_PICTURES = {b"avc1", b"hvc1", b"hev1", b"av01", b"vp09", b"mp4v"}
# Matroska's Segment, SeekHead, Seek, Info, Tracks, TrackEntry, Video, Colour, Cues, CuePoint,
# CueTrackPositions, Cluster, BlockGroup, Tags
_MATROSKA_PARENTS = {0x18538067, 0x114D9B74, 0x4DBB, 0x1549A966, 0x1654AE6B, 0xAE, 0xE0, 0x55B0} | {
    *(0x1C53BB6B, 0xBB, 0xB7, 0x1F43B675, 0xA0, 0x1254C367)
}
_PAYLOAD = {b"mdat", 0xA3, 0xA1}  # and AVI's, whose names begin with the stream's number
# What sizes, counts and times become: the edges of the types that they are read into.
_EDGES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63)


def mutant(seed: int) -> tuple[str, bytes, str]:
    """A file's name, its content, and how it was made."""
    choose = random.Random(seed)
    base = BASES[seed % len(BASES)]
    content = bytearray(bases()[base])
    done = [choose.choice(_CHANGES)(content, choose) for _ in range(choose.choice((1, 1, 1, 2, 3)))]
    return f"{seed}.{ENCODINGS[base].container}", bytes(content), f"{base}: {', '.join(done)}"


@functools.cache
def bases() -> dict[str, bytes]:
    """The valid files by their encodings' names: the same bytes in every process."""
    with tempfile.TemporaryDirectory() as folder:
        return {
            name: write_encoded(
                Path(folder), name, num_frames=_NUM_FRAMES, width=_WIDTH, picture=_picture
            ).read_bytes()
            for name in BASES
        }


def _picture(number: int, width: int, height: int) -> NDArray[np.uint8]:
    """A moving slope under noise, so that there is payload to be hit."""
    noise = np.random.default_rng(number).integers(0, 40, (height, width, 3))
    y, x = np.mgrid[:height, :width]
    return ((3 * x + 2 * y + 9 * number)[..., None] % 200 + noise).astype(np.uint8)


@dataclass(frozen=True)
class _Part:
    """A box of mp4, a chunk of AVI or an element of Matroska, at these bytes of the file."""

    begin: int
    length_at: int
    length_size: int
    """Bytes of the length field."""
    body: int
    end: int
    kind: bytes | int
    """Matroska's are integers."""
    depth: int

    @property
    def is_payload(self) -> bool:
        return self.kind in _PAYLOAD or (isinstance(self.kind, bytes) and self.kind[:2].isdigit())


def _is_avi(content: bytes | bytearray) -> bool:
    return content[:4] == b"RIFF"


def _is_matroska(content: bytes | bytearray) -> bool:
    return content[:4] == b"\x1a\x45\xdf\xa3"


def _parts(content: bytes | bytearray) -> list[_Part]:
    """All parts of a file that can be found, in the order in which they begin."""
    walk = _chunks if _is_avi(content) else _elements if _is_matroska(content) else _boxes
    return list(walk(content, 0, len(content), 0))


def _boxes(content: bytes | bytearray, begin: int, end: int, depth: int) -> Iterator[_Part]:
    while begin + 8 <= end:
        length, kind = struct.unpack_from(">I4s", content, begin)
        if length < 8 or begin + length > end:
            return
        yield _Part(begin, begin, 4, begin + 8, begin + length, kind, depth)
        # What comes before the children, header included.
        before = 8 if kind in _MP4_PARENTS else 16 if kind == b"stsd" else 0
        before = 86 if kind in _MP4_PICTURES else before
        if before:
            yield from _boxes(content, begin + before, begin + length, depth + 1)
        begin += length


def _chunks(content: bytes | bytearray, begin: int, end: int, depth: int) -> Iterator[_Part]:
    while begin + 8 <= end:
        kind, length = struct.unpack_from("<4sI", content, begin)
        if begin + 8 + length > end:
            return
        yield _Part(begin, begin + 4, 4, begin + 8, begin + 8 + length, kind, depth)
        if kind in (b"RIFF", b"LIST"):
            yield from _chunks(content, begin + 12, begin + 8 + length, depth + 1)
        begin += 8 + length + length % 2


def _elements(content: bytes | bytearray, begin: int, end: int, depth: int) -> Iterator[_Part]:
    while begin + 2 <= end:
        length_at = begin + 9 - content[begin].bit_length()
        if length_at >= end:
            return
        length_size = 9 - content[length_at].bit_length()
        body = length_at + length_size
        if length_size > 8 or body > end:
            return
        kind = int.from_bytes(content[begin:length_at])
        length = int.from_bytes(content[length_at:body]) & (1 << 7 * length_size) - 1
        if body + length > end:
            return
        yield _Part(begin, length_at, length_size, body, body + length, kind, depth)
        if kind in _MATROSKA_PARENTS:
            yield from _elements(content, body, body + length, depth + 1)
        begin = body + length


def _set_length(content: bytearray, part: _Part, length: int) -> None:
    """Write a length into its field, cut to what fits."""
    size = part.length_size
    if isinstance(part.kind, int):
        marker = 1 << 7 * size
        field = (length % marker | marker).to_bytes(size)
    else:
        field = (length % 2**32).to_bytes(size, "little" if _is_avi(content) else "big")
    content[part.length_at : part.length_at + size] = field


def _somewhere(content: bytes | bytearray, choose: random.Random, size: int = 1) -> int:
    """A byte of a header more often than of the pictures, which are most of the file.

    In a header it is the first of a field of `size` bytes, if all its fields have that size.
    """
    headers = [part for part in _parts(content) if not part.is_payload]
    if headers and choose.random() < 0.6:
        part = choose.choice(headers)
        # Its first bytes: a parent's children have turns of their own.
        place = choose.randrange(part.begin, min(part.end, part.begin + 120))
        return max(part.begin, place - (place - part.body) % size)
    return choose.randrange(len(content) or 1)


def _flip_bits(content: bytearray, choose: random.Random) -> str:
    places = [_somewhere(content, choose) for _ in range(choose.choice((1, 1, 2, 4)))]
    for place in places:
        if place < len(content):
            content[place] ^= 1 << choose.randrange(8)
    return f"bits flipped at {places}"


def _overwrite(content: bytearray, choose: random.Random) -> str:
    place, length = _somewhere(content, choose), choose.choice((1, 1, 2, 4, 16, 64))
    length = min(length, len(content) - place)
    new = choose.choice((bytes(length), b"\xff" * length, choose.randbytes(length)))
    content[place : place + length] = new
    return f"{length} bytes overwritten at {place}"


def _write_number(content: bytearray, choose: random.Random) -> str:
    size = choose.choice((1, 2, 4, 4, 8))
    place = min(_somewhere(content, choose, size), max(0, len(content) - size))
    number = choose.choice(_EDGES) % 256**size
    content[place : place + size] = number.to_bytes(size, choose.choice(("big", "little")))
    return f"{number} written into {size} bytes at {place}"


def _cut(content: bytearray, choose: random.Random) -> str:
    end = choose.randrange(len(content) or 1)
    del content[end:]
    return f"cut at {end}"


def _append(content: bytearray, choose: random.Random) -> str:
    length = choose.choice((1, 7, 100, 5000))
    content += choose.choice((bytes(length), choose.randbytes(length)))
    return f"{length} bytes appended"


def _insert(content: bytearray, choose: random.Random) -> str:
    place, length = _somewhere(content, choose), choose.choice((1, 2, 4, 50, 1000))
    content[place:place] = choose.choice((bytes(length), choose.randbytes(length)))
    return f"{length} bytes inserted at {place}"


def _move_block(content: bytearray, choose: random.Random) -> str:
    place, length = _somewhere(content, choose), choose.choice((1, 4, 16, 256, 2000))
    block = bytes(content[place : place + length])
    what = choose.choice(("removed", "doubled", "copied", "moved"))
    if what in ("removed", "moved"):
        del content[place : place + length]
    to = place if what == "doubled" else _somewhere(content, choose)
    if what in ("doubled", "moved"):
        content[to:to] = block
    elif what == "copied":
        content[to : to + length] = block
    return f"{length} bytes at {place} {what}"


def _change_length(content: bytearray, choose: random.Random) -> str:
    found = _parts(content)
    if not found:
        return "nothing"
    part = choose.choice(found)
    length = part.end - part.body + (0 if _is_avi(content) or _is_matroska(content) else 8)
    new = choose.choice((length - 1, length + 1, length // 2, 2 * length, *_EDGES))
    _set_length(content, part, new)
    return f"{part.kind!r} at {part.begin} of {length} bytes says {new}"


def _change_parts(content: bytearray, choose: random.Random) -> str:
    """Whole parts are removed, doubled, swapped or taken from elsewhere; mostly parents know."""
    found = _parts(content)
    if not found:
        return "nothing"
    part = choose.choice(found)
    block = bytes(content[part.begin : part.end])
    end = part.end
    what = choose.choice(("removed", "doubled", "swapped", "replaced", "joined"))
    if what == "removed":
        new = b""
    elif what == "doubled":
        new = block + block
    elif what == "swapped":
        later = [other for other in found if other.begin >= end and other.depth == part.depth]
        if not later:
            return "nothing"
        other = choose.choice(later[:3])
        new = bytes(content[other.begin : other.end] + content[end : other.begin]) + block
        end = other.end
    else:
        alike = [base for base in bases().values() if base[:3] == content[:3]]
        file = choose.choice(alike or [bytes(content)])
        foreign = choose.choice(_parts(file))
        new = bytes(file[foreign.begin : foreign.end]) + (block if what == "joined" else b"")
        what += f" with {foreign.kind!r}"
    longer = len(new) - (end - part.begin)
    if choose.random() < 0.8:
        for parent in found:
            if parent.begin < part.begin and end <= parent.end:
                header = 0 if _is_avi(content) or _is_matroska(content) else 8
                _set_length(content, parent, parent.end - parent.body + header + longer)
    content[part.begin : end] = new
    return f"{part.kind!r} at {part.begin} {what}"


def _change_packets(content: bytearray, choose: random.Random) -> str:
    """Written anew: a sound file, whose packets are lost, doubled, swapped, late, cut, ..."""
    written, done = io.BytesIO(), []
    format_name = "avi" if _is_avi(content) else "matroska" if _is_matroska(content) else "mp4"
    try:
        with av.open(io.BytesIO(content)) as source:
            assert isinstance(source, InputContainer)
            stream = source.streams.video[0]
            packets = [packet for packet in source.demux(stream) if packet.size]
            step = (packets[1].dts or 0) - (packets[0].dts or 0)
            times = [(packets[0].dts or 0) + number * step for number in range(len(packets) + 3)]
            for _ in range(choose.randint(1, 3)):
                done.append(_change_packet(packets, choose))
            with av.open(
                written, "w", format=format_name, options={"fflags": "+bitexact"}
            ) as target:
                assert isinstance(target, OutputContainer)
                copy = target.add_stream_from_template(stream, opaque=True)
                for packet, dts in zip(packets, times, strict=False):
                    packet.stream, packet.dts = copy, dts  # no container takes others
                    if packet.pts is not None:
                        packet.pts = max(packet.pts, dts)
                    target.mux(packet)
    except (av.error.FFmpegError, IndexError, ValueError) as error:
        return f"nothing ({type(error).__name__})"  # an earlier change left no sound file
    content[:] = written.getvalue()
    return ", ".join(done)


def _change_packet(packets: list[Packet], choose: random.Random) -> str:
    place, other = choose.randrange(len(packets)), choose.randrange(len(packets))
    packet = packets[place]
    what = choose.choice(("lost", "doubled", "swapped", "late", "key", "joined", "cut"))
    if what == "lost":
        del packets[place]
    elif what == "doubled":
        packets.insert(other, _with_data(packet, bytes(packet)))
    elif what == "swapped":
        packets[place], packets[other] = packets[other], packet
    elif what == "late" and packet.pts is not None:
        packet.pts += choose.choice((1, 512, 20000, 10**9))
    elif what == "key":
        packet.is_keyframe = not packet.is_keyframe
    elif what == "joined":
        packets[place] = _with_data(packet, bytes(packet) + bytes(packets[other]))
    elif what == "cut":
        packets[place] = _with_data(packet, bytes(packet)[: choose.randrange(1, packet.size + 1)])
    return f"packet {place} {what}"


def _with_data(packet: Packet, data: bytes) -> Packet:
    copy = Packet(data)
    copy.time_base, copy.pts, copy.dts = packet.time_base, packet.pts, packet.dts
    copy.duration, copy.is_keyframe = packet.duration, packet.is_keyframe
    return copy


# As often as they stand here.
_CHANGES: tuple[Callable[[bytearray, random.Random], str], ...] = (
    *(_flip_bits, _flip_bits, _overwrite, _overwrite, _write_number, _write_number, _write_number),
    *(_cut, _append, _insert, _move_block, _move_block, _change_length, _change_length),
    *(_change_parts, _change_parts, _change_parts),
    *(_change_packets, _change_packets, _change_packets, _change_packets),
)


if __name__ == "__main__":
    file_name, data, story = mutant(int(sys.argv[1]))
    Path(sys.argv[2], file_name).write_bytes(data)
    print(f"{Path(sys.argv[2], file_name)}: {story}")
