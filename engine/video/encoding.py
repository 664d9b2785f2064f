"""The encoding of videos to train on, chosen so that a window costs little CPU to decode.

Motion JPEG's pictures stand by themselves, and only a window's are decoded. VP9's keyframes are
frequent. Both are 4:2:0, because NVDEC decodes no other, and in BT.601's colours, because DALI
converts no other.

Shapes: H x W pixels, C = 3 (RGB), uint8.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import av
import numpy as np
from av.container import OutputContainer
from av.video.stream import VideoStream
from numpy.typing import NDArray

Codec = Literal["mjpeg", "vp9"]
_BT601 = 5
"""libav's number of the matrix "bt470bg"."""
_RANGES = {"MPEG": 1, "JPEG": 2}
"""libav's numbers of 16..235 and 0..255."""


@dataclass(frozen=True)
class Encoding:
    """A codec's container and settings."""

    suffix: str
    encoder: str
    pixel_format: str
    range: Literal["MPEG", "JPEG"]
    options: dict[str, str]
    """Of the encoder. One thread: files are encoded in parallel, and have the same bytes always."""


ENCODINGS: dict[Codec, Encoding] = {
    "mjpeg": Encoding(
        "mkv", "mjpeg", "yuvj420p", "JPEG", {"qmin": "2", "qmax": "2", "threads": "1"}
    ),  # near lossless
    "vp9": Encoding(
        "webm",
        "libvpx-vp9",
        "yuv420p",
        "MPEG",
        {"crf": "12", "b": "0", "deadline": "realtime", "cpu-used": "6", "g": "16", "threads": "1"},
    ),
}
DEFAULT_CODEC: Codec = "mjpeg"
# Matroska files otherwise carry a random id, and no two runs make the same files.
REPEATABLE = {"fflags": "+bitexact"}


def add_stream(
    container: OutputContainer, codec: Codec, width: int, height: int, rate: Fraction
) -> VideoStream:
    """A video stream of `rate` frames per second; frame n's time is n ticks of its clock."""
    encoding = ENCODINGS[codec]
    stream = container.add_stream(encoding.encoder, rate=rate, options=dict(encoding.options))
    assert isinstance(stream, VideoStream)
    stream.pix_fmt = encoding.pixel_format
    stream.width, stream.height = width, height
    stream.time_base = 1 / rate
    return stream


def tag_colours(stream: VideoStream, codec: Codec, like: av.VideoFrame) -> None:
    """Say in the stream what `to_yuv` does, and that primaries and transfer are those of `like`."""
    context = stream.codec_context
    context.colorspace, context.color_range = _BT601, _RANGES[ENCODINGS[codec].range]
    context.color_primaries, context.color_trc = like.color_primaries, like.color_trc


def to_yuv(frame_HWC: NDArray[np.uint8], codec: Codec) -> av.VideoFrame:
    """A frame in a codec's pixel format, by BT.601's matrix.

    A colour sample is the mean of its four pixels ("AREA"): where colours change from one pixel to
    the next, swscale's other filters are up to 20 dB worse.
    """
    encoding = ENCODINGS[codec]
    return av.VideoFrame.from_ndarray(frame_HWC, format="rgb24").reformat(
        format=encoding.pixel_format,
        src_color_range="JPEG",
        dst_colorspace="ITU601",
        dst_color_range=encoding.range,
        interpolation="AREA",
        threads=1,
    )
