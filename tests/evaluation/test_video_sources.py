"""Sources: the same videos as files, as frames and as an archive; and what is none."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from engine.errors import UserError
from engine.evaluation import video_sources
from engine.evaluation.video_sources import ArchivedVideos, VideoFiles, open_source
from engine.video.lossless import clip_archive, write_pngs
from engine.video.procedural import render_clip
from engine.video.writing import write_mp4


def clip(number: int, num_frames: int = 12, side: int = 32) -> NDArray[np.uint8]:
    return render_clip(number % 8, 0, number, num_frames, side)


def test_files_are_decoded_as_written(tmp_path: Path) -> None:
    """H.264 of flat frames is within 3 levels; numbered frames come in their order."""
    levels = np.arange(20, 240, 20, dtype=np.uint8)
    video = np.repeat(levels[:, None, None, None], 32, 1).repeat(48, 2).repeat(3, 3)
    write_mp4(tmp_path / "b" / "two.mp4", video, 10)
    write_mp4(tmp_path / "one.mp4", video[::-1].copy(), 10)
    write_mp4(tmp_path / "grid.mp4", video, 10)  # sample.py's, beside its clips
    (tmp_path / "notes.txt").write_text("not a video")
    source = open_source(tmp_path)
    assert isinstance(source, VideoFiles)
    assert source.names == ["b/two.mp4", "one.mp4"]
    assert [source.label(n) for n in range(2)] == ["b", None]
    shape = source.inspect(0)
    assert (shape.num_frames, shape.height, shape.width) == (11, 32, 48)
    frames = source.read(0, shape, [3, 5, 7])
    assert frames.shape == (3, 32, 48, 3)
    assert np.abs(frames.mean((1, 2, 3)) - [80, 120, 160]).max() < 3
    assert source.digest(0) != source.digest(1)


def test_many_files_are_inspected_by_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order asked for, and as one process does it; a damaged one is told by its name."""
    for number in range(5):
        write_mp4(tmp_path / f"{number}.mp4", clip(number, num_frames=3 + number), 8)
    source = open_source(tmp_path)
    order = [3, 0, 4, 1, 2]
    expected = [(number, source.inspect(number)) for number in order]
    monkeypatch.setattr(video_sources, "_LEAST_FOR_PROCESSES", 2)
    monkeypatch.setattr(video_sources, "cores_per_process", lambda: 2)
    assert list(source.inspect_all(order, num_ahead=4)) == expected
    (tmp_path / "1.mp4").write_bytes(b"not a video")
    with pytest.raises(UserError, match=r"cannot use .*1\.mp4: .*; mend or remove it"):
        list(source.inspect_all(order, num_ahead=5))


def test_frames_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    video = clip(0)
    write_pngs(tmp_path / "frames" / "clip-0", video)
    for number in range(12):  # not padded: frame-10 before frame-2 by name
        file = tmp_path / "frames" / "clip-1" / f"frame-{number}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(video[number]).save(file)
    source = open_source(tmp_path / "frames")
    assert source.names == ["clip-0", "clip-1"]
    for number in range(2):
        found = source.read(number, source.inspect(number), [0, 2, 11])
        np.testing.assert_array_equal(found, video[[0, 2, 11]])


@pytest.mark.parametrize("compressed", [False, True])
def test_an_archive_is_what_was_saved(tmp_path: Path, compressed: bool) -> None:
    videos = np.stack([clip(n) for n in range(3)])
    path, labels = tmp_path / "samples.npz", np.array([4, 4, 7])
    if compressed:
        np.savez_compressed(path, videos=videos, labels=labels)
    else:
        with clip_archive(path, 3, videos.shape[1], fps=np.array(8.0), labels=labels) as add:
            for video in videos:
                add(video)
    source = open_source(path)
    assert isinstance(source, ArchivedVideos)
    assert isinstance(source._videos_NTHWC, np.memmap) is not compressed
    assert [source.label(n) for n in range(3)] == ["4", "4", "7"]
    np.testing.assert_array_equal(source.read(2, source.inspect(2), [1, 5]), videos[2, [1, 5]])
    memory = ArchivedVideos("memory", videos)
    assert [memory.digest(n) for n in range(3)] == [source.digest(n) for n in range(3)]
    assert len({source.digest(n) for n in range(3)}) == 3


def test_a_plain_npz_of_numpys_is_mapped_too(tmp_path: Path) -> None:
    videos = np.stack([clip(n) for n in range(2)])
    np.savez(tmp_path / "plain.npz", videos=videos)
    source = open_source(tmp_path / "plain.npz")
    np.testing.assert_array_equal(source.read(1, source.inspect(1), list(range(12))), videos[1])


def mistaken(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_source(path)
    return str(caught.value)


def test_what_is_no_source(tmp_path: Path) -> None:
    assert "no such folder" in mistaken(tmp_path / "gone")
    (tmp_path / "file.txt").write_text("x")
    assert "it is a file" in mistaken(tmp_path / "file.txt")
    assert "no mp4, webm" in mistaken(tmp_path)
    write_pngs(tmp_path / "flat", clip(0))
    assert "a folder of their own for each video" in mistaken(tmp_path / "flat")
    write_mp4(tmp_path / "a.mp4", clip(0), 8)
    write_mp4(tmp_path / "sampled" / "clip-000.mp4", clip(0), 8)
    np.savez(tmp_path / "sampled" / "samples.npz", videos=clip(0)[None])
    assert "holds samples.npz beside video files" in mistaken(tmp_path / "sampled")
    (tmp_path / "sampled" / "samples.npz").unlink()
    assert "holds both video files (a.mp4) and folders of frames (flat)" in mistaken(tmp_path)


def test_what_is_no_archive(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_text("x")
    assert f"cannot read {path}" in mistaken(path)
    np.savez(path, clips=np.zeros(3))
    assert "has no array 'videos', only clips.npy" in mistaken(path)
    np.savez(path, videos=np.zeros((2, 4, 8, 8, 3), np.float32))
    assert "'videos' is float32 [2, 4, 8, 8, 3], not uint8" in mistaken(path)
    np.savez(path, videos=np.zeros((2, 4, 8, 8, 3), np.uint8), labels=np.zeros(3))
    assert "3 labels of 2 videos" in mistaken(path)
    np.savez(path, videos=np.array([{}], dtype=object))
    assert "objects" in mistaken(path)
    np.savez(path, videos=np.zeros((2, 4, 8, 8, 3), np.uint8))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert f"cannot read {path}" in mistaken(path)


def test_a_damaged_video_and_a_damaged_frame(tmp_path: Path) -> None:
    write_mp4(tmp_path / "v" / "a.mp4", clip(0), 8)
    content = (tmp_path / "v" / "a.mp4").read_bytes()
    (tmp_path / "v" / "a.mp4").write_bytes(content[: len(content) - 600])
    with pytest.raises(UserError, match=r"cannot use .*a\.mp4: .*; mend or remove it"):
        open_source(tmp_path / "v").inspect(0)
    write_pngs(tmp_path / "f" / "clip", clip(0))
    frame = tmp_path / "f" / "clip" / "000003.png"
    frame.write_bytes(frame.read_bytes()[:100])
    source = open_source(tmp_path / "f")
    with pytest.raises(UserError, match=r"cannot read the frame .*000003\.png"):
        source.read(0, source.inspect(0), [2, 3])
    Image.fromarray(np.full((32, 32), 40_000, np.uint16)).save(frame)
    with pytest.raises(UserError, match="more than 8 bits per value"):
        source.read(0, source.inspect(0), [2, 3])
    Image.fromarray(clip(0, side=16)[0]).save(frame)
    with pytest.raises(UserError, match=r"has 16x16 pixels, the first frame of its folder 32x32"):
        source.read(0, source.inspect(0), [2, 3])
