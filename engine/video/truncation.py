"""A check whether a file is shorter than its own header says, as an interrupted copy is.

The length is read from the outermost boxes alone: mp4's and mov's (ISO/IEC 14496-12, section 4.2),
AVI's RIFF chunk and Matroska's Segment (RFC 8794 and 9559). Durations would not tell: a header may
rightly promise that the last picture stays for seconds.
"""

import os
from pathlib import Path
from typing import BinaryIO

from engine.video.containers import RejectedError

_EBML, _SEGMENT = 0x1A45DFA3, 0x18538067
_FIRST_BOXES = {b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"}
_MOST_BOXES = 10_000


def check_whole(path: Path) -> None:
    """Raises RejectedError for a file that ends before its outermost boxes do.

    Not for one that begins as none of these formats does.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        signature = file.read(12)
        file.seek(0)
        end = 0
        if signature[:4] == b"RIFF" and signature[8:] == b"AVI ":
            end = _riff_end(file)
        elif signature[:4] == _EBML.to_bytes(4):
            end = _segment_end(file, size)
        elif signature[4:8] in _FIRST_BOXES:
            end = _boxes_end(file, size)
    if end > size:
        raise RejectedError(f"truncated: {size} of {end} bytes")


def _riff_end(file: BinaryIO) -> int:
    # The first chunk's: files of more than a gigabyte have several; a cut behind it goes unseen.
    length = int.from_bytes(file.read(8)[4:], "little")
    return 0 if length == 0xFFFFFFFF else 8 + length  # a writer that did not come back


def _boxes_end(file: BinaryIO, size: int) -> int:
    """Where the last of the boxes that begin inside the file ends."""
    end = 0
    for _ in range(_MOST_BOXES):
        file.seek(end)
        header = file.read(16)
        if len(header) < 8:
            return end
        length = int.from_bytes(header[:4])
        if length == 1:
            length = int.from_bytes(header[8:16])
        # 0: up to the file's end. Less than a header, or an odd name: not a box.
        if length < 8 or not header[4:8].isalnum():
            return end
        end += length
        if end >= size:
            return end
    return end


def _segment_end(file: BinaryIO, size: int) -> int:
    """Where a Matroska file's Segment ends; 0 where it does not say."""
    for _ in range(2):  # the EBML header, then the Segment
        element = _number(file, with_marker=True)
        length = _number(file, with_marker=False)
        if element is None or length is None:
            return 0
        if element == _SEGMENT:
            return file.tell() + length
        if length > size:  # a damaged header may say more than a file can be long
            return 0
        file.seek(length, os.SEEK_CUR)
    return 0


def _number(file: BinaryIO, *, with_marker: bool) -> int | None:
    """A variable-length integer; None if it is cut, malformed or stands for "unknown"."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    length = 9 - first[0].bit_length()
    content = first + file.read(length - 1)
    if len(content) < length:
        return None
    value = int.from_bytes(content)
    if with_marker:
        return value
    value &= (1 << 7 * length) - 1
    return None if value == (1 << 7 * length) - 1 else value
