"""Symbolic links that lead out of a folder of videos: nothing behind them is read unasked."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from clip_loading import index_of, loader
from numbered_videos import write_numbered
from opened_files import opens_of
from small_runs import call

import engine.prepare
from engine.configuration import Data
from engine.errors import UserError
from engine.evaluation.video_sources import IndexedVideos, VideoShape, open_source
from engine.video.dataset import open_dataset
from engine.video.folders import LINK_OUT, NOT_INDEXED
from engine.video.index import VideoIndex, load_rejects
from engine.video.indexing import build_index

PASSWORDS = Path("/etc/passwd")


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A video that nobody has named."""
    return write_numbered(tmp_path / "outside", "mjpeg", num_frames=20)


@pytest.fixture
def videos(tmp_path: Path, outside: Path) -> Path:
    """A folder with a video, a link to it, and links that lead out of the folder."""
    folder = tmp_path / "videos"
    inside = write_numbered(folder / "real", "mjpeg", num_frames=20)
    (folder / "real" / "again.mkv").symlink_to(inside)
    (folder / "real" / "file.mkv").symlink_to(outside)
    (folder / "real" / "relative.mkv").symlink_to("../../outside/" + outside.name)
    (folder / "real" / "passwords.mp4").symlink_to(PASSWORDS)
    (folder / "folder").symlink_to(outside.parent)
    (folder / "etc").symlink_to("/etc")
    (folder / "round").symlink_to(folder)
    return folder


def test_it_is_noticed_what_is_opened(outside: Path) -> None:
    with opens_of(outside, PASSWORDS) as opened:
        outside.read_bytes()
    assert opened == [outside]


def test_links_out_of_the_folder_are_rejected(videos: Path, outside: Path) -> None:
    with opens_of(PASSWORDS, outside) as opened:
        index, rejects = build_index(
            videos, videos.parent / "i.jsonl", num_workers=1, progress=False
        )
        loader(index, replace_failed=True, batch_size=2).close()
    assert not opened
    assert [entry.path for entry in index.entries] == ["real/again.mkv", "real/mjpeg.mkv"]
    out = ["etc/", "folder/", "real/file.mkv", "real/passwords.mp4", "real/relative.mkv"]
    assert {reject.path: reject.reason for reject in rejects} == dict.fromkeys(out, NOT_INDEXED)
    assert VideoIndex.load(videos.parent / "i.jsonl") == index


def test_prepare_follows_them_when_told_to(videos: Path) -> None:
    out = videos.parent / "i.jsonl"
    (videos / "etc").unlink()  # a system's folder holds too much
    said = call(engine.prepare.main, videos, "--out", out, "--workers", "1").out
    assert f"4  {NOT_INDEXED}  (e.g. folder/)" in said
    # What was refused before is judged now.
    call(engine.prepare.main, videos, "--out", out, "--workers", "1", "--follow-symlinks")
    index = VideoIndex.load(out)
    assert index.classes == ("folder", "real")
    assert [entry.path for entry in index.entries] == [
        *("folder/mjpeg.mkv", "real/again.mkv", "real/file.mkv"),
        *("real/mjpeg.mkv", "real/relative.mkv"),
    ]
    assert [reject.path for reject in load_rejects(out)] == ["real/passwords.mp4"]
    clips = loader(index, batch_size=5)
    assert len(next(clips).labels_B) == 5
    clips.close()


def test_a_root_that_is_a_link_is_no_matter(tmp_path: Path, outside: Path) -> None:
    (tmp_path / "link").symlink_to(outside.parent)
    index, rejects = build_index(
        tmp_path / "link", tmp_path / "i.jsonl", num_workers=0, progress=False
    )
    assert [entry.path for entry in index.entries] == [outside.name]
    assert not rejects
    assert len(open_source(tmp_path / "link")) == 1
    # Also one that an index leads to.
    clips = loader(replace(index, root=tmp_path / "link"), batch_size=1)
    next(clips)
    clips.close()


def test_a_folder_of_links_is_one_line_with_the_remedy(tmp_path: Path, outside: Path) -> None:
    (tmp_path / "links" / "class").mkdir(parents=True)
    (tmp_path / "links" / "class" / "a.mkv").symlink_to(outside)
    (tmp_path / "links" / "other").symlink_to(outside.parent)
    data = Data(path=str(tmp_path / "links"), num_threads=1)
    with pytest.raises(UserError, match=f"no usable video .* 2 rejected, e.g. .*: {NOT_INDEXED}"):
        open_dataset(data, make=True, say=print)
    # The same folder is trained on once it is indexed so.
    out = tmp_path / "links" / "index.jsonl"
    build_index(tmp_path / "links", out, follow_symlinks=True, num_workers=0, progress=False)
    said: list[str] = []
    assert len(open_dataset(data, make=True, say=said.append).entries) == 2
    assert not said


def test_a_small_folder_that_is_trained_on_leaves_them_out(videos: Path) -> None:
    said: list[str] = []
    data = Data(path=str(videos), num_threads=1, max_rejected=1)
    index = open_dataset(data, make=True, say=said.append)
    assert len(index.entries) == 2
    assert said[1:] == [
        f"5 videos are left out, e.g. etc/: {NOT_INDEXED}; "
        f"{videos / 'index.rejects.jsonl'} lists all"
    ]
    with pytest.raises(UserError, match=f"5 of 7 videos .* 5 like etc/: {NOT_INDEXED}"):
        open_dataset(data.model_copy(update={"max_rejected": 0.5}), make=True, say=said.append)


@pytest.mark.parametrize("decoder", ["dali-cpu", "pyav"])
def test_a_file_that_became_a_link_is_not_opened(tmp_path: Path, decoder: str) -> None:
    """Of the old size and time: nothing else would tell."""
    path = write_numbered(tmp_path / "videos", "mjpeg", num_frames=20)
    index = index_of(path.parent)
    moved = path.rename(tmp_path / "moved.mkv")
    path.symlink_to(moved)
    assert os.stat(path).st_mtime_ns == index.entries[0].modified_ns
    clips = loader(index, decoder=decoder)
    with opens_of(moved) as opened, pytest.raises(UserError, match=NOT_INDEXED):
        next(clips)
    assert not opened
    clips.close()
    source = IndexedVideos(index)
    shape = VideoShape(20, 64, 96, index.entries[0])
    with opens_of(moved) as opened, pytest.raises(UserError, match=NOT_INDEXED):
        source.read(0, shape, [0])
    assert not opened


@pytest.mark.parametrize("name", ["file.mkv", "passwords.mp4", "frame.png", "folder"])
def test_sources_of_an_evaluation_refuse_them(tmp_path: Path, outside: Path, name: str) -> None:
    folder = tmp_path / "evaluated"
    write_numbered(folder, "mjpeg", num_frames=20)
    (folder / "notes.txt").symlink_to(PASSWORDS)  # is not read anyway
    assert len(open_source(folder)) == 1
    link, target = folder / name, outside.parent if name == "folder" else outside
    link.symlink_to(PASSWORDS if name == "passwords.mp4" else target)
    with opens_of(PASSWORDS, outside) as opened, pytest.raises(UserError) as caught:
        open_source(folder)
    assert not opened
    assert str(caught.value) == f"{link} is {LINK_OUT}; --follow-symlinks takes it"


def test_sources_of_an_evaluation_follow_them_when_told_to(tmp_path: Path, outside: Path) -> None:
    folder = tmp_path / "evaluated"
    folder.mkdir()
    (folder / "a.mkv").symlink_to(outside)
    (folder / "folder").symlink_to(outside.parent)
    source = open_source(folder, follow_symlinks=True)
    assert source.names == ["a.mkv", "folder/mjpeg.mkv"]
