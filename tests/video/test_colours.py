"""One file, one set of colours: whatever its matrix and range, whichever decoder."""

import re
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.stream import VideoStream
from numpy.typing import NDArray

from engine.errors import UserError
from engine.video import decoder_choice
from engine.video.containers import RejectedError
from engine.video.decoding import decode_window
from engine.video.indexing import build_index
from engine.video.inspection import inspect_video
from engine.video.loader import ClipLoader

# ITU-T H.273, table 4: the shares of red and blue in luma.
MATRICES = {
    "bt709": (1, 0.2126, 0.0722),
    "bt470bg": (5, 0.299, 0.114),
    "smpte170m": (6, 0.299, 0.114),
    "smpte240m": (7, 0.212, 0.087),
    "bt2020nc": (9, 0.2627, 0.0593),
    "unspecified": (2, 0.299, 0.114),
}
RANGES = {"limited": 1, "full": 2}
COLOURS = [(40, 200, 60), (200, 40, 30), (30, 40, 220), (128, 128, 128)]
ENCODERS = {
    "mp4": ("libx264", {"crf": "2"}),
    "webm": ("libvpx-vp9", {"crf": "4", "b": "0"}),
    "mkv": ("libx265", {"x265-params": "crf=2:log-level=none"}),
}


def write_colours(
    path: Path, matrix: str, value_range: str, *, transfer: int = 2, code: int | None = None
) -> Path:
    """Bars of COLOURS, by the definition of the matrix, tagged with it."""
    given, red, blue = MATRICES[matrix]
    code = given if code is None else code
    path.parent.mkdir(exist_ok=True)
    encoder, options = ENCODERS[path.suffix[1:]]
    levels = np.array(COLOURS) / 255
    luma = levels @ (red, 1 - red - blue, blue)
    chroma = [(levels[:, 2] - luma) / (2 - 2 * blue), (levels[:, 0] - luma) / (2 - 2 * red)]
    low, luma_span, chroma_span = (16, 219, 224) if value_range == "limited" else (0, 255, 255)
    planes = [low + luma_span * luma, *(128 + chroma_span * c for c in chroma)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=25, options=options)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        context = stream.codec_context
        context.colorspace, context.color_range, context.color_trc = (
            code,
            RANGES[value_range],
            transfer,
        )
        for number in range(3):
            frame = av.VideoFrame(stream.width, stream.height, "yuv420p")
            frame.pts, frame.colorspace, frame.color_range = number, code, RANGES[value_range]
            for plane, values in zip(frame.planes, planes, strict=True):
                row = np.zeros(plane.line_size, np.uint8)
                row[: plane.width] = np.round(values).repeat(plane.width // len(COLOURS))
                plane.update(np.tile(row, plane.height).tobytes())
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def loaded(folder: Path, decoder: str) -> NDArray[np.float64]:
    """The middles of the bars as the loader gives them, [4, C]."""
    index, _ = build_index(folder, folder.parent / "index.jsonl", num_workers=0, progress=False)
    clips = ClipLoader(
        index,
        num_frames=2,
        frame_stride=1,
        resolution=64,
        view_resolution=64,
        batch_size=len(index.entries),
        decoder=decoder,
    )
    levels = (next(clips).video_BTCHW[:, 0, :, 32, 8::16].mean(0) + 1) * 127.5
    clips.close()
    return levels.T.double().numpy()


@pytest.mark.parametrize("suffix", ENCODERS)
@pytest.mark.parametrize("value_range", RANGES)
@pytest.mark.parametrize("matrix", MATRICES)
def test_colours_are_those_that_were_written(
    matrix: str, value_range: str, suffix: str, tmp_path: Path
) -> None:
    path = write_colours(tmp_path / "v" / f"x.{suffix}", matrix, value_range)
    facts = inspect_video(path)
    assert facts.matrix == matrix
    if value_range == "full":  # what is not full is limited, said or not
        assert facts.range == "full"
    levels = loaded(path.parent, "pyav")
    assert np.abs(levels - COLOURS).max() <= 3


@pytest.mark.parametrize("value_range", RANGES)
@pytest.mark.parametrize("matrix", ["bt470bg", "smpte170m", "unspecified"])
def test_dali_agrees_where_it_is_used(matrix: str, value_range: str, tmp_path: Path) -> None:
    """The reason for setup.py's lower bound: DALI before 2.3 takes full range for limited."""
    path = write_colours(tmp_path / "v" / "x.webm", matrix, value_range)
    levels = loaded(path.parent, "dali-cpu")
    assert np.abs(levels - COLOURS).max() <= 3
    assert np.abs(levels - loaded(path.parent, "pyav")).max() <= 3


@pytest.mark.parametrize("matrix", ["bt709", "smpte240m", "bt2020nc"])
def test_dali_is_not_used_where_its_colours_would_be_wrong(matrix: str, tmp_path: Path) -> None:
    path = write_colours(tmp_path / "v" / "x.webm", matrix, "limited")
    with pytest.raises(UserError, match=f"cannot decode 1 of 1 .1 vp9 in {matrix} colours"):
        loaded(path.parent, "dali-cpu")


def test_it_would_be_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the test above: DALI takes every matrix for BT.601, and a trial would find it."""
    path = write_colours(tmp_path / "v" / "x.webm", "bt709", "limited")
    monkeypatch.setattr(decoder_choice, "BT601", {"bt709"})
    with pytest.raises(UserError, match=r"cannot decode x\.webm: it is \d+ levels off what PyAV"):
        loaded(path.parent, "dali-cpu")
    monkeypatch.setattr(decoder_choice, "try_dali", lambda *_: None)
    assert np.abs(loaded(path.parent, "dali-cpu") - COLOURS).max() > 20


def test_grey_has_a_range_too(tmp_path: Path) -> None:
    path = tmp_path / "x.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "gray"
        stream.codec_context.color_range = RANGES["limited"]
        levels = np.array([16, 60, 126, 235], np.uint8).repeat(16)
        frame = av.VideoFrame.from_ndarray(np.tile(levels, (64, 1)), format="gray")
        frame.color_range = RANGES["limited"]
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert inspect_video(path).range == "limited"
    window = decode_window(path, start_frame=0, num_frames=1, frame_stride=1, video_frames=1)
    assert window[0, 32, 8::16].tolist() == [[n] * 3 for n in (0, 51, 128, 255)]


@pytest.mark.parametrize(("transfer", "kind"), [(16, "PQ"), (18, "HLG")])
@pytest.mark.parametrize("suffix", ENCODERS)
def test_high_dynamic_range_is_rejected(
    suffix: str, transfer: int, kind: str, tmp_path: Path
) -> None:
    path = write_colours(tmp_path / f"x.{suffix}", "bt2020nc", "limited", transfer=transfer)
    with pytest.raises(RejectedError, match=rf"high dynamic range \({kind}\)"):
        inspect_video(path)


def test_matrices_that_nobody_converts_are_rejected(tmp_path: Path) -> None:
    path = write_colours(tmp_path / "x.mp4", "bt709", "limited", code=8)
    with pytest.raises(RejectedError, match="the colour matrix ycgco"):
        inspect_video(path)


def test_pyav_is_new_enough_to_know_matrices(tmp_path: Path) -> None:
    """The reason for setup.py's lower bound: PyAV before 17 converts all as BT.601."""
    path = write_colours(tmp_path / "x.mp4", "bt709", "limited")
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert np.abs(frame[32, 8::16].astype(int) - COLOURS).max() <= 3


def test_lower_bounds_are_what_colours_need() -> None:
    """The two tests above fail with what is older."""
    setup = Path(__file__).parents[2].joinpath("setup.py").read_text()
    assert re.findall(r'"av>=([\d.]+)"', setup) == ["17"]
    assert re.findall(r'"nvidia-dali-cuda\d+>=([\d.]+);', setup) == ["2.3"]
