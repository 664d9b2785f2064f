"""Files for a person to watch: mp4 files, grids of clips, contact sheets.

`lossless.py` writes the files for a program to measure.

Shapes: B clips, T frames, C = 3 channels (RGB), H x W pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.video.codeccontext import VideoCodecContext
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from engine.durable_files import writing

_BT709 = 1
"""libav's number of BT.709 as a matrix, as primaries and as a transfer function alike."""
_LIMITED = 1  # its number of the range 16..235, "MPEG"
FrameTaker = Callable[[Tensor | NDArray[np.uint8]], None]
"""Takes the next frames of a video, uint8 [t, C, H, W] or [t, H, W, C]."""
NUM_COLUMNS = 8
"""Frames of a clip in a contact sheet."""
_SEPARATOR = 2  # pixels between clips
_BACKGROUND = 24  # grey level around them


def to_uint8(video: Tensor) -> Tensor:
    """Values in [-1, 1] to 0..255, the inverse of the loader's u8 / 127.5 - 1; clipped outside."""
    return video.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def write_mp4(
    path: str | Path, frames: Tensor | NDArray[np.uint8], fps: float, *, scale: int = 1
) -> None:
    """Write uint8 frames, [T, C, H, W] or [T, H, W, C], as `mp4_file` does."""
    frames_THWC = as_THWC(frames)
    with mp4_file(path, fps, scale=scale) as add:
        add(frames_THWC)


@contextmanager
def mp4_file(path: str | Path, fps: float, *, scale: int = 1) -> Iterator[FrameTaker]:
    """H.264 that every player shows, of frames that come in chunks.

    What is yielded takes uint8 frames, [T, C, H, W] or [T, H, W, C], all of one size. `scale`
    enlarges each pixel to a square of so many (nearest neighbour), for small clips. Odd sizes gain
    a repeated row or column, since 4:2:0 colour needs even ones. The same frames give the same
    file. Raises ValueError for other shapes or types, UserError if it cannot be written.

    Colours are converted by BT.709's matrix to limited range, and the stream and the container say
    so: a decoder that heeds the tags returns flat colours within 3 levels of 255. Fine detail is
    not kept (4:2:0 colour, quantisation): `lossless.py` is for what is to be measured.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.writing")
    with writing(path, av.error.FFmpegError):  # x264 refuses more than 16384 pixels
        path.parent.mkdir(parents=True, exist_ok=True)
        options = {"movflags": "+faststart", "fflags": "+bitexact"}
        with av.open(str(aside), "w", format="mp4", options=options) as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            stream.pix_fmt = "yuv420p"
            _tag_colours(stream.codec_context)
            # The same frames are to give the same bytes. x264 divides a frame's rate control among
            # threads; and its macroblock tree reads memory that nobody wrote, for some sizes.
            fixed = {"threads": "1", "x264-params": "mbtree=0"}
            stream.options = {"crf": "16", "preset": "medium", **fixed}

            def add(frames: Tensor | NDArray[np.uint8]) -> None:
                for frame_HWC in as_THWC(frames):
                    frame_HWC = frame_HWC.repeat(scale, axis=0).repeat(scale, axis=1)
                    height, width = frame_HWC.shape[:2]
                    if not stream.codec_context.is_open:
                        stream.width, stream.height = width + width % 2, height + height % 2
                    odd = (0, height % 2), (0, width % 2), (0, 0)
                    container.mux(stream.encode(_to_yuv(np.pad(frame_HWC, odd, "edge"))))

            yield add
            container.mux(stream.encode())
        aside.replace(path)


def _tag_colours(codec: VideoCodecContext) -> None:
    """Say in the H.264 stream, and so in the mp4's `colr` box, what `_to_yuv` does.

    Decided: BT.709 for small videos too. Of untagged ones players guess, mostly by size, and a
    wrong guess between BT.601 and BT.709 is up to 39 levels off. Decided: BT.709's transfer
    function; generated values are like those of decoded videos, and nothing converts either.
    """
    codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
    codec.color_range = _LIMITED


def _to_yuv(frame_HWC: NDArray[np.uint8]) -> av.VideoFrame:
    """One frame of limited-range BT.709; the encoder's own conversion would be BT.601's."""
    return av.VideoFrame.from_ndarray(frame_HWC, format="rgb24").reformat(
        format="yuv420p",
        src_color_range="JPEG",
        dst_colorspace="ITU709",
        dst_color_range="MPEG",
        interpolation="BICUBIC",
        threads=1,  # which bytes come is to depend on nothing else
    )


def grid(videos_BTCHW: Tensor, columns: int) -> Tensor:
    """Clips side by side, row by row: uint8 [B, T, C, H, W] to one uint8 video [T, C, H', W']."""
    num_clips, num_frames, channels, height, width = videos_BTCHW.shape
    rows = -(-num_clips // columns)
    cell_height, cell_width = height + _SEPARATOR, width + _SEPARATOR
    canvas_TCHW = torch.full(
        (
            num_frames,
            channels,
            rows * cell_height + _SEPARATOR,
            columns * cell_width + _SEPARATOR,
        ),
        _BACKGROUND,
        dtype=torch.uint8,
    )
    for number, video_TCHW in enumerate(videos_BTCHW.cpu()):
        top = _SEPARATOR + number // columns * cell_height
        left = _SEPARATOR + number % columns * cell_width
        canvas_TCHW[:, :, top : top + height, left : left + width] = video_TCHW
    return canvas_TCHW


def evenly_spaced(num_frames: int, num_shown: int) -> list[int]:
    """Numbers of `num_shown` frames from the first to the last, or of all if they are fewer."""
    return [round(x) for x in np.linspace(0, num_frames - 1, min(num_shown, num_frames)).tolist()]


def contact_sheet(
    videos_BTCHW: Tensor,
    path: str | Path,
    num_frames_shown: int = NUM_COLUMNS,
    labels: Sequence[str] | None = None,
    min_frame_pixels: int = 96,
) -> None:
    """A PNG with a row per clip (uint8 [B, T, C, H, W]) and evenly spaced frames left to right.

    Small frames are enlarged by a whole factor (nearest neighbour) to at least
    `min_frame_pixels`. `labels` are written left of the rows. Raises UserError if the file cannot
    be written.
    """
    num_frames, _, height, width = videos_BTCHW.shape[1:]
    shown = evenly_spaced(num_frames, num_frames_shown)
    scale = max(1, -(-min_frame_pixels // min(height, width)))
    frames = videos_BTCHW[:, shown].reshape(-1, 1, *videos_BTCHW.shape[2:])
    enlarged = frames.repeat_interleave(scale, dim=-1).repeat_interleave(scale, dim=-2)
    sheet = Image.fromarray(as_THWC(grid(enlarged, len(shown)))[0])
    if labels is not None:
        sheet = _with_labels(sheet, labels, row_pixels=height * scale + _SEPARATOR)
    path = Path(path)
    aside = path.with_name(f".{path.name}.writing")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(aside, format="PNG")
        aside.replace(path)


def animation(
    rows: Sequence[tuple[str, Tensor]], path: str | Path, fps: float, *, scale: int = 1
) -> None:
    """An animated WebP with a labelled row of clips (uint8 [B, T, C, H, W]) for each of `rows`.

    For pages that show pictures but no videos. `scale` enlarges pixels as in `write_mp4`. Raises
    ValueError where rows differ in shape, UserError if the file cannot be written.
    """
    labels = [label for label, _ in rows]
    shapes = {tuple(videos_BTCHW.shape) for _, videos_BTCHW in rows}
    if len(shapes) != 1:
        raise ValueError(f"rows of one shape, not of {sorted(shapes)}")
    columns, _, _, height, _ = shapes.pop()
    videos = torch.cat([videos_BTCHW.cpu() for _, videos_BTCHW in rows])
    videos = videos.repeat_interleave(scale, dim=-1).repeat_interleave(scale, dim=-2)
    row_pixels = height * scale + _SEPARATOR
    frames = [
        _with_labels(Image.fromarray(frame_HWC), labels, row_pixels)
        for frame_HWC in as_THWC(grid(videos, columns))
    ]
    _save_animation(path, frames, fps)


@contextmanager
def animation_file(path: str | Path, fps: float, *, scale: int = 1) -> Iterator[FrameTaker]:
    """An animated WebP or GIF, by the path's ending, of frames that come in chunks.

    What is yielded takes frames as `mp4_file`'s does, and `scale` is the same. All frames are in
    memory until the file is written. Raises UserError if it cannot be.
    """
    frames: list[Image.Image] = []

    def add(chunk: Tensor | NDArray[np.uint8]) -> None:
        enlarged = as_THWC(chunk).repeat(scale, axis=1).repeat(scale, axis=2)
        frames.extend(Image.fromarray(frame_HWC) for frame_HWC in enlarged)

    yield add
    _save_animation(path, frames, fps)


def _save_animation(path: str | Path, frames: Sequence[Image.Image], fps: float) -> None:
    """One that plays for ever."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.writing")
    kind = path.suffix.removeprefix(".").upper()
    options: dict[str, int] = {"quality": 80, "method": 6} if kind == "WEBP" else {}
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        frames[0].save(
            aside,
            format=kind,
            save_all=True,
            append_images=frames[1:],
            duration=round(1000 / fps),
            loop=0,
            **options,
        )
        aside.replace(path)


def _with_labels(sheet: Image.Image, labels: Sequence[str], row_pixels: int) -> Image.Image:
    font = ImageFont.load_default(size=16)
    margin = max(int(font.getlength(label)) for label in labels) + 16
    labelled = Image.new("RGB", (sheet.width + margin, sheet.height), (_BACKGROUND,) * 3)
    labelled.paste(sheet, (margin, 0))
    draw = ImageDraw.Draw(labelled)
    for row, label in enumerate(labels):
        middle = (row * row_pixels) + _SEPARATOR + row_pixels // 2
        draw.text((8, middle), label, fill=(230,) * 3, font=font, anchor="lm")
    return labelled


def as_THWC(frames: Tensor | NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 frames [T, C, H, W] or [T, H, W, C] as the latter; ValueError for anything else."""
    array = frames.detach().cpu().numpy() if isinstance(frames, Tensor) else frames
    if array.dtype != np.uint8 or array.ndim != 4:
        raise ValueError(f"expected uint8 frames [T, C, H, W], got {array.dtype} {array.shape}")
    if array.shape[-1] == 3:
        return array
    if array.shape[1] == 3:
        return array.transpose(0, 2, 3, 1)
    raise ValueError(f"expected 3 channels, got shape {array.shape}")
