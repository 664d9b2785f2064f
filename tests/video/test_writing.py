import itertools
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.codeccontext import VideoCodecContext
from numbered_videos import decode_all, numbered_frame, read_number
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from engine.errors import UserError
from engine.video.inspection import inspect_video
from engine.video.writing import animation, contact_sheet, grid, to_uint8, write_mp4


def test_to_uint8_inverts_the_loader_and_clips() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels.float() / 127.5 - 1), levels)
    assert to_uint8(torch.tensor([-1.5, 1.5, 0.0])).tolist() == [0, 255, 128]


@pytest.mark.parametrize("channels_first", [True, False])
def test_mp4_holds_the_frames_in_order(channels_first: bool, tmp_path: Path) -> None:
    frames = np.stack([numbered_frame(number, 65, 33) for number in range(20)])
    given = torch.from_numpy(frames.transpose(0, 3, 1, 2)) if channels_first else frames
    path = tmp_path / "new folder" / "clip é.mp4"
    write_mp4(path, given, fps=12.5)
    facts = inspect_video(path)
    assert (facts.num_frames, facts.fps) == (20, 12.5)
    assert (facts.width, facts.height) == (66, 34)  # odd sizes are padded
    assert (facts.codec, facts.pixel_format) == ("h264", "yuv420p")
    decoded = decode_all(path)[:, :33, :65]
    assert [read_number(frame) for frame in decoded] == list(range(20))
    assert np.abs(decoded.astype(float) - frames).mean() < 6
    first = path.read_bytes()
    write_mp4(path, given, fps=12.5)
    assert path.read_bytes() == first
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_mp4_depends_on_nothing_but_its_frames(tmp_path: Path) -> None:
    """Not on what memory held before, with which glibc fills what it hands out."""
    code = """
import sys, numpy as np
from engine.video.writing import write_mp4
random = np.random.default_rng(0)
for n, (width, height) in enumerate([(304, 160), (216, 144), (66, 50), (38, 20)]):
    frames = random.integers(0, 256, (6, height, width, 3), dtype=np.uint8)
    write_mp4(f"{sys.argv[1]}/{n}.mp4", frames, fps=12.5)
"""
    for filling in ("1", "85"):
        (tmp_path / filling).mkdir()
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / filling)],
            env={**os.environ, "MALLOC_PERTURB_": filling},
            cwd=Path(__file__).parents[2],
            check=True,
        )
    for n in range(4):
        first, second = ((tmp_path / filling / f"{n}.mp4").read_bytes() for filling in ("1", "85"))
        assert first == second


def test_mp4_says_its_colours_in_the_stream_and_in_the_container(tmp_path: Path) -> None:
    """BT.709 is number 1 in H.264's tables, and so is limited range in libav's."""
    path = tmp_path / "x.mp4"
    write_mp4(path, np.zeros((2, 16, 16, 3), np.uint8), fps=25)
    with av.open(str(path)) as container:
        codec = container.streams.video[0].codec_context
        assert tags(codec) == (1, 1, 1, 1)
        # The stream alone: a decoder that was not told what the container says.
        alone = av.CodecContext.create("h264", "r")
        assert isinstance(alone, VideoCodecContext)
        alone.extradata = codec.extradata
        assert tags(alone) == (2, 2, 2, 0)  # unknown
        assert [frame for packet in container.demux(video=0) for frame in alone.decode(packet)]
        assert tags(alone) == (1, 1, 1, 1)
    # The container alone, ISO/IEC 14496-12: three numbers of 16 bits, and a bit of full range.
    assert b"colrnclx" + bytes([0, 1, 0, 1, 0, 1, 0]) in path.read_bytes()


def tags(codec: VideoCodecContext) -> tuple[int, int, int, int]:
    return codec.color_primaries, codec.color_trc, codec.colorspace, codec.color_range


@pytest.mark.parametrize("scale", [1, 3])
def test_mp4_colours_come_back_through_the_tagged_matrix(scale: int, tmp_path: Path) -> None:
    """Written with BT.601's, which they would be by default, red would be 33 levels off.

    A level of limited range is 1.2 of 255, and blue takes its own 2.1 times: rounding Y and Cb to
    whole levels is an error of 0.58 + 1.06, and the quantiser may add as much.
    """
    levels = np.array(list(itertools.product([0, 128, 255], repeat=3)), dtype=np.uint8)
    frames = np.broadcast_to(levels[:, None, None], (27, 16, 16, 3))
    write_mp4(tmp_path / "x.mp4", frames, fps=25, scale=scale)

    def largest_error(red: float, blue: float) -> float:
        """Of decoding by the definition, with the weights of red and blue in luma."""
        shown = [_rgb(frame, red, blue) for frame in decoded]
        return max(float(abs(rgb - level).max()) for rgb, level in zip(shown, levels, strict=True))

    with av.open(str(tmp_path / "x.mp4")) as container:
        decoded = list(container.decode(video=0))
    assert largest_error(0.2126, 0.0722) < 3.3  # BT.709
    assert largest_error(0.299, 0.114) > 20  # BT.601


def _rgb(frame: av.VideoFrame, red: float, blue: float) -> NDArray[np.float64]:
    y, cb, cr = (
        np.frombuffer(bytes(plane), np.uint8).reshape(plane.height, plane.line_size)[
            :, : plane.width
        ]
        for plane in frame.planes
    )
    luma = (y - 16.0) / 219
    b_y, r_y = ((chroma.repeat(2, 0).repeat(2, 1) - 128.0) / 224 for chroma in (cb, cr))
    r, b = luma + 2 * (1 - red) * r_y, luma + 2 * (1 - blue) * b_y
    g = (luma - red * r - blue * b) / (1 - red - blue)
    return np.clip(np.stack([r, g, b], axis=-1) * 255, 0, 255)


def test_mp4_scale_enlarges_pixels(tmp_path: Path) -> None:
    frames = np.zeros((3, 8, 8, 3), dtype=np.uint8)
    frames[:, 4:] = 255
    write_mp4(tmp_path / "x.mp4", frames, fps=25, scale=8)
    decoded = decode_all(tmp_path / "x.mp4")
    assert decoded.shape == (3, 64, 64, 3)
    assert decoded[:, :30].max() < 16
    assert decoded[:, 34:].min() > 240


def test_mp4_refuses_what_is_no_video(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="uint8"):
        write_mp4(tmp_path / "x.mp4", torch.zeros(4, 3, 8, 8), fps=25)
    with pytest.raises(ValueError, match="3 channels"):
        write_mp4(tmp_path / "x.mp4", torch.zeros(4, 4, 8, 8, dtype=torch.uint8), fps=25)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_mp4(tmp_path / "file" / "x.mp4", np.zeros((1, 8, 8, 3), np.uint8), fps=25)
    with pytest.raises(UserError, match="cannot write"):  # wider than x264 can
        write_mp4(tmp_path / "x.mp4", np.zeros((1, 8, 16386, 3), np.uint8), fps=25)


def test_grid_places_clips_row_by_row() -> None:
    videos = torch.arange(1, 6, dtype=torch.uint8)[:, None, None, None, None] * 40
    sheet = grid(videos.expand(5, 2, 3, 4, 6), columns=3)
    assert sheet.shape == (2, 3, 2 * 6 + 2, 3 * 8 + 2)
    for number in range(5):
        top, left = 2 + number // 3 * 6, 2 + number % 3 * 8
        assert (sheet[:, :, top : top + 4, left : left + 6] == (number + 1) * 40).all()
    assert (sheet[:, :, 8:, 18:] == 24).all()  # the empty cell


def test_contact_sheet_shows_first_to_last_frame(tmp_path: Path) -> None:
    videos = (torch.arange(9, dtype=torch.uint8) * 20)[None, :, None, None, None]
    videos = torch.cat([videos, 255 - videos]).expand(2, 9, 3, 16, 16)
    contact_sheet(videos, tmp_path / "a.png", num_frames_shown=3)
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    assert pixels.shape == (2 * 98 + 2, 3 * 98 + 2, 3)  # 16 pixels, enlarged six times
    assert pixels[50, [50, 148, 246], 0].tolist() == [0, 80, 160]
    assert pixels[148, [50, 148, 246], 0].tolist() == [255, 175, 95]
    contact_sheet(videos, tmp_path / "b.png", 3, labels=["archery", "a longer name"])
    labelled = np.asarray(Image.open(tmp_path / "b.png"))
    margin = labelled.shape[1] - pixels.shape[1]
    assert np.array_equal(labelled[:, margin:], pixels)
    assert (labelled[:98, :margin] > 150).any()  # the label is drawn beside its row
    assert (labelled[98:, :margin] > 150).any()


def test_animation_shows_every_frame_of_every_row(tmp_path: Path) -> None:
    """Two rows of three clips of one grey level each, which rises from frame to frame."""
    levels_RBT = torch.arange(30).reshape(2, 3, 5) * 8
    rows = [
        (name, levels_BT.to(torch.uint8)[:, :, None, None, None].expand(-1, -1, 3, 16, 16))
        for name, levels_BT in zip(("real", "generated"), levels_RBT, strict=True)
    ]
    path = tmp_path / "new" / "clips.webp"
    animation(rows, path, fps=25, scale=2)
    with Image.open(path) as image:
        assert (sum(1 for _ in ImageSequence.Iterator(image)), image.info["loop"]) == (5, 0)
        right = image.width - (3 * 34 + 2)  # labels stand left of the clips
        assert right > 0
        for t in range(5):
            image.seek(t)
            pixels = np.asarray(image.convert("RGB")).astype(int)
            assert image.info["duration"] == 40
            for row in range(2):
                for clip in range(3):
                    middle = pixels[row * 34 + 18, right + clip * 34 + 18]
                    assert np.abs(middle - levels_RBT[row, clip, t].item()).max() < 6
    with pytest.raises(ValueError, match="rows of one shape"):
        animation([rows[0], ("shorter", rows[1][1][:, :4])], path, fps=25)
