"""The colours that a file's values mean: matrix, range, primaries, transfer; and which can be used.

The names are FFmpeg's for the code points of ITU-T H.273. Frames become RGB by the matrix and the
range alone, in the file's own primaries and transfer: as players show standard dynamic range.
A file that does not say its matrix is taken for BT.601, as FFmpeg takes it, whatever its size.
"""

import threading
from dataclasses import dataclass

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from engine.video.containers import RejectedError

_UNSPECIFIED = "unspecified"
_MATRICES = {
    0: "gbr",
    1: "bt709",
    2: _UNSPECIFIED,
    4: "fcc",
    5: "bt470bg",
    6: "smpte170m",
    7: "smpte240m",
    8: "ycgco",
    9: "bt2020nc",
    10: "bt2020c",
    14: "ictcp",
}
BT601 = frozenset({_UNSPECIFIED, "bt470bg", "smpte170m"})
"""The matrices that are BT.601's, and that of files which do not say."""
_CONVERTED = BT601 | {"bt709", "fcc", "smpte240m", "bt2020nc"}
_RANGES = {0: _UNSPECIFIED, 1: "limited", 2: "full"}
_PRIMARIES = {
    1: "bt709",
    2: _UNSPECIFIED,
    4: "bt470m",
    5: "bt470bg",
    6: "smpte170m",
    7: "smpte240m",
    8: "film",
    9: "bt2020",
    10: "smpte428",
    11: "smpte431",
    12: "smpte432",
    22: "ebu3213",
}
_TRANSFERS = {
    1: "bt709",
    2: _UNSPECIFIED,
    4: "gamma22",
    5: "gamma28",
    6: "smpte170m",
    7: "smpte240m",
    8: "linear",
    9: "log100",
    10: "log316",
    11: "iec61966-2-4",
    12: "bt1361e",
    13: "iec61966-2-1",
    14: "bt2020-10",
    15: "bt2020-12",
    16: "smpte2084",
    17: "smpte428",
    18: "arib-std-b67",
}
_OF_THREAD = threading.local()
_FROM_LIMITED = ((np.arange(256) - 16) * 255 / 219).round().clip(0, 255).astype(np.uint8)
_HIGH_DYNAMIC_RANGE = {"smpte2084": "PQ", "arib-std-b67": "HLG"}


@dataclass(frozen=True, slots=True)
class Colour:
    """What a file says of its colours; "unspecified" where it is silent."""

    matrix: str
    range: str
    primaries: str
    transfer: str


def colour_of(frame: VideoFrame) -> Colour:
    """A decoded frame's. Raises RejectedError where RGB as we make it would be wrong."""
    colour = Colour(
        _name(_MATRICES, frame.colorspace),
        _name(_RANGES, frame.color_range),
        _name(_PRIMARIES, frame.color_primaries),
        _name(_TRANSFERS, frame.color_trc),
    )
    if kind := _HIGH_DYNAMIC_RANGE.get(colour.transfer):
        raise RejectedError(
            f"high dynamic range ({kind}): without tone mapping its white would be grey"
        )
    if not frame.format.is_rgb and colour.matrix not in _CONVERTED:
        raise RejectedError(f"has the colour matrix {colour.matrix}, which is not supported")
    return colour


def rgb(frame: VideoFrame) -> NDArray[np.uint8]:
    """uint8 [H, W, 3] as coded, by the frame's own matrix and range."""
    # Kept, and with one thread: making a converter, and its threads, takes ten times as long as a
    # small frame's conversion.
    if not hasattr(_OF_THREAD, "converter"):
        _OF_THREAD.converter = VideoReformatter()
    converted = _OF_THREAD.converter.reformat(frame, format="rgb24", threads=1)
    if frame.format.name.startswith("gray") and _RANGES.get(frame.color_range) == "limited":
        return _FROM_LIMITED[converted.to_ndarray()]  # swscale takes all grey for full range
    return converted.to_ndarray().astype(np.uint8, copy=False)


def _name(names: dict[int, str], value: int | None) -> str:
    code = int(2 if value is None else value)
    return names.get(code, f"reserved-{code}")
