"""Whatever the codec, the container and the order of the packets: frame n is the n-th shown."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.codec.context import Flags
from av.container import InputContainer
from av.video.frame import VideoFrame
from encoded_videos import ENCODINGS, NUM_FRAMES, write_encoded
from numbered_videos import decode_all, numbered_frame, read_number

from engine.video import decoding
from engine.video.colour import rgb
from engine.video.decoding import decode_window
from engine.video.inspection import inspect_video
from engine.video.keyframes import KeyframeTable, Start, frames_from, pack, unpack


def wrong_windows(path: Path, full: np.ndarray, table: KeyframeTable | None) -> list:
    wrong = []
    for num_frames, stride in ((1, 1), (3, 1), (4, 5)):
        span = (num_frames - 1) * stride + 1
        for start in range(len(full) - span + 1):
            window = decode_window(
                path,
                start_frame=start,
                num_frames=num_frames,
                frame_stride=stride,
                video_frames=len(full),
                keyframes=table,
            )
            if not np.array_equal(window, full[start : start + span : stride]):
                wrong.append((num_frames, stride, start))
    return wrong


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_window_is_a_slice_of_the_full_decode(name: str, tmp_path: Path) -> None:
    path = write_encoded(tmp_path, name)
    full = decode_all(path)
    assert [read_number(frame) for frame in full] == list(range(NUM_FRAMES))
    facts = inspect_video(path)
    assert (facts.num_frames, facts.fps) == (NUM_FRAMES, 25.0)
    assert facts.codec == ENCODINGS[name].codec
    table = unpack(facts.keyframes)
    assert bool(len(table)) == ENCODINGS[name].starts
    assert wrong_windows(path, full, table) == []


@pytest.mark.parametrize("name", ["h264-mp4-gop12-b3", "mpeg4-avi-packed-gop12", "vp9-webm-plain"])
def test_few_pictures_are_decoded_for_a_window(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the test above would pass by decoding from the beginning every time."""
    path = write_encoded(tmp_path, name, num_frames=200)
    facts = inspect_video(path)
    decoded = []
    frames_from = decoding.frames_from

    def counted(*given: Any) -> Iterator[VideoFrame]:
        for frame in frames_from(*given):
            decoded.append(frame)
            yield frame

    monkeypatch.setattr(decoding, "frames_from", counted)
    window = decode_window(
        path,
        start_frame=190,
        num_frames=3,
        frame_stride=2,
        video_frames=200,
        keyframes=unpack(facts.keyframes),
    )
    assert [read_number(frame) for frame in window] == [190, 192, 194]
    assert 5 <= len(decoded) <= 12 + 5


@pytest.mark.parametrize("name", ["mjpeg-avi", "mjpeg-mkv", "mjpeg-mov", "prores-mov"])
def test_of_pictures_by_themselves_no_other_is_decoded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_encoded(tmp_path, name)
    facts = inspect_video(path)
    opened, decoded = [], []
    open_video, intra_frames = decoding.open_video, decoding.intra_frames

    def open_counted(file: Path) -> InputContainer:
        opened.append(file)
        return open_video(file)

    def counted(*given: Any) -> Iterator[VideoFrame]:
        for frame in intra_frames(*given):
            decoded.append(frame)
            yield frame

    monkeypatch.setattr(decoding, "open_video", open_counted)
    monkeypatch.setattr(decoding, "intra_frames", counted)
    window = decode_window(
        path,
        start_frame=20,
        num_frames=4,
        frame_stride=5,
        video_frames=NUM_FRAMES,
        keyframes=unpack(facts.keyframes),
    )
    assert [read_number(frame) for frame in window] == [20, 25, 30, 35]
    assert (len(opened), len(decoded)) == (1, 4)  # and the file was not begun anew


@pytest.mark.parametrize("name", ["h264-mkv-gop12-b3", "mjpeg-avi"])
def test_another_demuxer_is_noticed(name: str, tmp_path: Path) -> None:
    """Where seeking leads elsewhere than when the table was made, decoding starts anew."""
    path = write_encoded(tmp_path, name)
    full = decode_all(path)
    starts = unpack(inspect_video(path).keyframes)
    start = starts.before(30)
    assert start is not None
    for elsewhere in (
        replace(start, seek=0),
        replace(start, position=start.position - 1),
        replace(start, seek=2**40),
    ):
        assert wrong_windows(path, full[:40], unpack(pack([elsewhere]))) == []
    # The control: what the table says is used.
    other = replace(start, number=start.number + 1)
    assert wrong_windows(path, full[:40], unpack(pack([other]))) != []


@pytest.mark.parametrize("num_frames", [10, NUM_FRAMES])  # every keyframe is tried, and some
def test_a_wrong_index_in_the_file_leads_nowhere(num_frames: int, tmp_path: Path) -> None:
    """AVI's index says where packets are; here two of them have changed places."""
    path = write_encoded(tmp_path, "mjpeg-avi", num_frames=num_frames, picture=of_some_bytes)
    content = path.read_bytes()
    with av.open(str(path)) as container:
        places = [packet.pos - 8 for packet in container.demux(video=0) if packet.pos is not None]
    one, two, three = places[6:9]
    path.write_bytes(content[:one] + content[two:three] + content[one:two] + content[three:])
    full = decode_all(path)
    facts = inspect_video(path)
    assert facts.num_frames == len(full) == num_frames
    assert wrong_windows(path, full, unpack(facts.keyframes)) == []


def of_some_bytes(number: int, width: int, height: int) -> np.ndarray:
    """Pictures that are coded into more bytes, the higher their number."""
    picture = numbered_frame(number, width, height)
    picture[: number + 1, ::2] += 20
    return picture


def test_what_is_shown_before_the_keyframe_is_not_counted(tmp_path: Path) -> None:
    """Should a decoder show the leading pictures of an open group after all."""
    path = write_encoded(tmp_path, "h264-mkv-open-gop")
    start = unpack(inspect_video(path).keyframes).before(30)
    assert start is not None
    with av.open(str(path)) as container:  # so that nothing is refused
        stream = container.streams.video[0]
        stream.codec_context.flags |= Flags.copy_opaque | Flags.output_corrupt
        container.seek(start.seek, stream=stream, backward=True)
        assert len(list(container.decode(stream))) > NUM_FRAMES - start.number
        shown = [read_number(rgb(frame)) for frame in frames_from(container, stream, start)]
    assert shown == list(range(start.number, NUM_FRAMES))


def test_tables_are_small_and_come_back() -> None:
    places = np.random.default_rng(3).integers(2_000, 60_000, 999).cumsum()
    starts = [Start(12 * n, 512 * n - 1024, int(place)) for n, place in enumerate(places)]
    text = pack(starts)
    table = unpack(text)
    assert [table.before(start.number) for start in starts[1:]] == starts[1:]
    assert table.before(12 * 998 + 7) == starts[-1]
    assert len(text) < 5 * len(starts)
    assert unpack("").before(5) is None
    for damaged in ("x", text[:-9], "AAAA"):
        with pytest.raises(ValueError, match="damaged"):
            unpack(damaged)
