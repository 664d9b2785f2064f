"""Numbered videos in every codec and container that is read, as encoders write them."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.stream import VideoStream
from numbered_videos import numbered_frame
from numpy.typing import NDArray

NUM_FRAMES, WIDTH, HEIGHT = 45, 96, 64
Picture = Callable[[int, int, int], NDArray[np.uint8]]
"""Of a number, a width and a height in pixels: uint8 [H, W, 3]."""
_REPEATABLE = {"fflags": "+bitexact"}  # Matroska's identifiers would be random


@dataclass(frozen=True)
class Encoding:
    """How a file is written."""

    codec: str
    """As in the index."""
    container: str
    encoder: str
    options: dict[str, str] = field(default_factory=dict)
    container_options: dict[str, str] = field(default_factory=dict)
    pixel_format: str = "yuv420p"
    packed: bool = False
    """As Xvid and DivX write B-frames into AVI, for players that expect a picture per packet."""
    starts: bool = True
    """Whether decoding can start inside the file."""


def _h264(container: str, gop: int, bframes: int, **more: str) -> Encoding:
    extra = "".join(f":{name.replace('_', '-')}={value}" for name, value in more.items())
    parameters = f"keyint={gop}:min-keyint=1:scenecut=0:bframes={bframes}:b-adapt=0{extra}"
    return Encoding("h264", container, "libx264", {"x264-params": parameters}, starts=gop < 45)


def _hevc(container: str, gop: int, open_gop: int) -> Encoding:
    parameters = f"keyint={gop}:min-keyint=1:scenecut=0:open-gop={open_gop}:log-level=none"
    return Encoding("hevc", container, "libx265", {"x265-params": parameters}, starts=gop < 45)


def _mpeg4(container: str, gop: int, bframes: int, *, packed: bool = False) -> Encoding:
    options = {"g": str(gop), "bf": str(bframes), "b_strategy": "0", "qmin": "2", "qmax": "3"}
    options["sc_threshold"] = "1000000000"
    return Encoding("mpeg4", container, "mpeg4", options, packed=packed, starts=gop < 45)


def _vpx(codec: str, container: str, gop: int, *, hidden: bool) -> Encoding:
    options = {"g": str(gop), "cpu-used": "6", "deadline": "realtime" if not hidden else "good"}
    options |= {"auto-alt-ref": "1", "lag-in-frames": "16"} if hidden else {"lag-in-frames": "0"}
    encoder = "libvpx" if codec == "vp8" else "libvpx-vp9"
    return Encoding(codec, container, encoder, options, starts=gop < 45)


ENCODINGS = {
    **{
        f"h264-{container}-gop{gop}-b{bframes}": _h264(container, gop, bframes)
        for container in ("mp4", "mov", "mkv", "avi")
        for gop, bframes in ((1, 0), (12, 0), (12, 3), (250, 3))
    },
    **{
        f"h264-{container}-open-gop": _h264(container, 12, 3, open_gop="1")
        for container in ("mp4", "mkv", "avi")
    },
    # As streaming servers write it.
    "h264-mp4-fragments": replace(
        _h264("mp4", 12, 3), container_options={"movflags": "frag_keyframe+empty_moov"}
    ),
    "h264-mp4-pyramid": _h264("mp4", 16, 7, b_pyramid="normal", ref="4"),
    # No keyframe but the first; pictures are renewed column by column.
    "h264-mkv-intra-refresh": replace(_h264("mkv", 15, 0, intra_refresh="1"), starts=False),
    **{
        f"hevc-{container}-{kind}": _hevc(container, 12, int(kind == "open-gop"))
        for container in ("mp4", "mov", "mkv")
        for kind in ("closed-gop", "open-gop")
    },
    **{
        f"mpeg4-{container}-gop{gop}-b{bframes}": _mpeg4(container, gop, bframes)
        for container in ("avi", "mp4", "mkv")
        for gop, bframes in ((1, 0), (12, 0), (12, 2), (250, 2))
    },
    "mpeg4-avi-packed-gop12": _mpeg4("avi", 12, 2, packed=True),
    "mpeg4-avi-packed-gop300": _mpeg4("avi", 300, 2, packed=True),
    **{
        f"vp8-{container}-{kind}": _vpx("vp8", container, 12, hidden=kind == "hidden")
        for container in ("webm", "mkv")
        for kind in ("plain", "hidden")
    },
    **{
        f"vp9-{container}-{kind}": _vpx("vp9", container, 12, hidden=kind == "hidden")
        for container in ("webm", "mkv", "mp4")
        for kind in ("plain", "hidden")
    },
    "vp9-webm-one-gop": _vpx("vp9", "webm", 250, hidden=True),
    **{
        f"av1-{container}": Encoding(
            "av1", container, "libsvtav1", {"g": "12", "preset": "12", "svtav1-params": "lp=1"}
        )
        for container in ("mp4", "webm")
    },
    **{
        f"mjpeg-{container}": Encoding(
            "mjpeg", container, "mjpeg", {"qmin": "2", "qmax": "2"}, pixel_format="yuvj420p"
        )
        for container in ("avi", "mkv", "mov")
    },
    "mpeg2video-mkv": Encoding("mpeg2video", "mkv", "mpeg2video", {"g": "12", "bf": "2"}),
    "msmpeg4v3-avi": Encoding("msmpeg4v3", "avi", "msmpeg4", {"g": "12"}),
    "prores-mov": Encoding("prores", "mov", "prores_ks", pixel_format="yuv422p10le"),
    "ffv1-mkv": Encoding("ffv1", "mkv", "ffv1", {"g": "1"}),
}


def write_encoded(
    folder: Path,
    name: str,
    *,
    num_frames: int = NUM_FRAMES,
    width: int = WIDTH,
    picture: Picture = numbered_frame,
) -> Path:
    """A numbered video, or one of other pictures, named after its encoding.

    The same bytes every time.
    """
    encoding = ENCODINGS[name]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.{encoding.container}"
    if encoding.packed:
        _write_packed(path, encoding, num_frames, width, picture)
        return path
    options = _REPEATABLE | encoding.container_options
    with _kept_priority(), av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(encoding.encoder, rate=25, options=encoding.options)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, HEIGHT, encoding.pixel_format
        for number in range(num_frames):
            frame = picture(number, width, HEIGHT)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


@contextmanager
def _kept_priority() -> Iterator[None]:
    """SVT-AV1, run by root, gives the calling thread the highest real-time priority for good.

    Two workers of that kind take two cores from all other threads, for whose work they then wait.
    """
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def _write_packed(
    path: Path, encoding: Encoding, num_frames: int, width: int, picture: Picture
) -> None:
    """[P B] [B] [a picture that is not coded], as UCF101's and HMDB51's files are."""
    encoder = av.codec.CodecContext.create(encoding.encoder, "w")
    assert isinstance(encoder, av.VideoCodecContext)
    encoder.width, encoder.height, encoder.pix_fmt = width, HEIGHT, encoding.pixel_format
    encoder.time_base, encoder.framerate = Fraction(1, 25), Fraction(25)
    encoder.options = encoding.options
    coded = []
    for number in range(num_frames):
        frame = av.VideoFrame.from_ndarray(picture(number, width, HEIGHT), format="rgb24")
        frame = frame.reformat(format=encoding.pixel_format)
        frame.pts = number
        coded += encoder.encode(frame)
    coded += encoder.encode()
    # The encoder's name, in the stream, is what tells decoders that it packs.
    data = [
        (re.sub(rb"Lavc\d+\.\d+\.\d+", b"DivX503b1393p", bytes(packet)), packet) for packet in coded
    ]
    chunks, place = [], 0
    while place < len(data):
        content, packet = data[place]
        following = data[place + 1 : place + 3]
        if len(following) == 2 and all((b.pts or 0) < (packet.pts or 0) for _, b in following):
            (first, _), (second, _) = following
            chunks.append((content + first, packet.is_keyframe))
            chunks += [(second, False), (b"\x00\x00\x01\xb6\x51\x00\x7f", False)]
            place += 3
        else:
            chunks.append((content, packet.is_keyframe))
            place += 1
    with av.open(str(path), "w", options=_REPEATABLE) as container:
        stream = container.add_stream(encoding.encoder, rate=25)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, HEIGHT, encoding.pixel_format
        for number, (content, is_keyframe) in enumerate(chunks):
            chunk = av.Packet(content)
            chunk.stream, chunk.time_base = stream, Fraction(1, 25)
            chunk.pts = chunk.dts = number
            chunk.is_keyframe = is_keyframe
            container.mux(chunk)
