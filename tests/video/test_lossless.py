"""PNG frames and npz archives: every bit comes back, where an mp4 changes fine detail."""

from collections.abc import Iterable
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from numbered_videos import decode_all
from numpy.typing import NDArray
from PIL import Image

from engine.errors import UserError
from engine.evaluation.spectra import spectra
from engine.video.lossless import clip_archive, write_pngs
from engine.video.writing import write_mp4


def noise(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_pngs_are_exact_and_sort_as_the_frames_do(tmp_path: Path) -> None:
    frames = noise(12, 6, 5, 3)
    write_pngs(tmp_path / "a" / "clip", frames)
    write_pngs(tmp_path / "b", torch.from_numpy(frames).permute(0, 3, 1, 2))
    for folder in (tmp_path / "a" / "clip", tmp_path / "b"):
        files = sorted(folder.iterdir())
        assert [file.name for file in files] == [f"{number:06d}.png" for number in range(12)]
        assert np.array_equal([np.asarray(Image.open(file)) for file in files], frames)
    with pytest.raises(ValueError, match="uint8"):
        write_pngs(tmp_path / "c", torch.zeros(4, 3, 8, 8))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        write_pngs(tmp_path / "file" / "clip", frames)


def test_an_archive_is_what_numpy_loads(tmp_path: Path) -> None:
    videos = noise(3, 4, 6, 5, 3)
    labels = np.array([2, 0, 2])
    for name in ("a.npz", "b.npz"):
        with clip_archive(tmp_path / name, 3, 4, labels=labels, fps=np.array(12.5)) as add:
            for number, video in enumerate(videos):
                # either order of the axes
                add(torch.from_numpy(video[:3]).permute(0, 3, 1, 2) if number else video[:3])
                add(video[3:])
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        assert sorted(archive) == ["fps", "labels", "videos"]
        assert archive["videos"].dtype == np.uint8
        assert np.array_equal(archive["videos"], videos)
        assert np.array_equal(archive["labels"], labels)
        assert archive["fps"] == 12.5
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with ZipFile(tmp_path / "a.npz") as members:  # no date, which would tell two runs apart
        assert {member.date_time for member in members.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_an_archive_grows_clip_by_clip(tmp_path: Path) -> None:
    """Nothing is kept for the end, but what a file's buffer holds: 8 KB."""
    video = noise(8, 64, 64, 3)
    path = tmp_path / "clips.npz"
    with clip_archive(path, 5, 8) as add:
        for number in range(1, 6):
            add(video)
            assert number * video.nbytes - 8192 <= path.stat().st_size
    assert path.stat().st_size < 5 * video.nbytes + 1024


def add_all(path: Path, num_clips: int, clips: Iterable[NDArray[np.uint8]]) -> None:
    with clip_archive(path, num_clips, 4) as add:
        for clip in clips:
            add(clip)


def test_an_archive_refuses_what_its_header_does_not_say(tmp_path: Path) -> None:
    video = noise(4, 6, 5, 3)
    with pytest.raises(ValueError, match="4 frames were added instead of 2 clips of 4"):
        add_all(tmp_path / "few.npz", 2, [video])
    with pytest.raises(ValueError, match="8 frames were added instead of 1 clips of 4"):
        add_all(tmp_path / "many.npz", 1, [video, video])
    with pytest.raises(ValueError, match=r"frames of \(6, 4, 3\) after ones of \(6, 5, 3\)"):
        add_all(tmp_path / "other.npz", 2, [video, video[:, :, :4]])
    with pytest.raises(OSError, match="No such file"):
        add_all(tmp_path / "nowhere" / "x.npz", 1, [video])


def test_an_mp4_changes_the_spectrum_and_the_others_do_not(tmp_path: Path) -> None:
    """Above radius 60 of 64. Both sides are the same noise: only the files can make a difference.

    Measured, the mp4 has 1.2 to 1.3 times the power.
    """
    video = noise(4, 128, 128, 3)
    write_mp4(tmp_path / "clip.mp4", video, fps=25)
    write_pngs(tmp_path / "frames", video)
    with clip_archive(tmp_path / "clips.npz", 1, 4) as add:
        add(video)
    with np.load(tmp_path / "clips.npz") as archive:
        from_npz = archive["videos"][0]
    from_png = np.stack(
        [np.asarray(Image.open(f)) for f in sorted((tmp_path / "frames").iterdir())]
    )

    def fine_power(frames: NDArray[np.uint8]) -> torch.Tensor:
        video_BTCHW = torch.from_numpy(frames).permute(0, 3, 1, 2)[None] / 127.5 - 1
        return spectra(video_BTCHW, range(4))[:, 61:].mean(dim=0)

    given = fine_power(video)
    assert torch.equal(fine_power(from_npz), given)
    assert torch.equal(fine_power(from_png), given)
    ratio = fine_power(decode_all(tmp_path / "clip.mp4")) / given
    assert (ratio - 1).abs().min() > 0.1
