import random
from pathlib import Path

import numpy as np
import pytest
from numbered_videos import (
    CODECS,
    cut_without_encoding,
    damage,
    decode_all,
    read_number,
    real_clip,
    write_numbered,
)

from engine.video.containers import RejectedError
from engine.video.decoding import decode_window
from engine.video.inspection import inspect_video
from engine.video.keyframes import unpack


def check_windows(path: Path, full: np.ndarray, num_windows: int) -> None:
    choose = random.Random(0)
    table = unpack(inspect_video(path).keyframes)
    for place in range(num_windows):
        stride, length = choose.choice([1, 2, 5]), choose.choice([1, 6])
        start = choose.randrange(len(full) - (length - 1) * stride)
        window = decode_window(
            path,
            start_frame=start,
            num_frames=length,
            frame_stride=stride,
            video_frames=len(full),
            keyframes=table if place % 4 else None,
        )
        assert np.array_equal(window, full[start : start + length * stride : stride])


@pytest.mark.parametrize("codec", CODECS)
def test_windows_equal_slices_of_a_full_decode(codec: str, tmp_path: Path) -> None:
    path = write_numbered(tmp_path, codec)
    full = decode_all(path)
    assert [read_number(frame) for frame in full] == list(range(80))
    check_windows(path, full, num_windows=12)


@pytest.mark.parametrize("name", ["carphone_pristine", "bikes"])
def test_windows_of_real_clips(name: str) -> None:
    check_windows(real_clip(name), decode_all(real_clip(name)), num_windows=5)


def test_windows_of_a_clip_cut_without_encoding(tmp_path: Path) -> None:
    path = cut_without_encoding(write_numbered(tmp_path, "h264"), num_frames=30)
    assert inspect_video(path).num_frames == 50
    full = decode_all(path)
    assert [read_number(frame) for frame in full] == list(range(30, 80))
    check_windows(path, full, num_windows=12)
    assert len(unpack(inspect_video(path).keyframes)) == 2  # of 40 and 60


def test_a_damaged_or_shortened_file_is_refused(tmp_path: Path) -> None:
    path = write_numbered(tmp_path, "h264", num_frames=30)
    with pytest.raises(RejectedError, match="no frame 35"):
        decode_window(path, start_frame=28, num_frames=8, frame_stride=1, video_frames=80)
    path = write_numbered(tmp_path, "h264")
    damage(path, start=path.stat().st_size // 2)
    with pytest.raises(RejectedError, match="damaged"):
        decode_window(path, start_frame=0, num_frames=80, frame_stride=1, video_frames=80)
