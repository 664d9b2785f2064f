"""From what a user names as data to an index and its facts."""

import os
from pathlib import Path
from typing import Any

import pytest
from numbered_videos import write_numbered

from engine.configuration import Data, ProceduralClips
from engine.errors import UserError
from engine.video import dataset
from engine.video.dataset import describe, open_dataset, untrained_classes
from engine.video.index import VERSION


def opened(path: Path, *, make: bool = True) -> list[str]:
    """What a rank says while it opens the data set."""
    said: list[str] = []
    open_dataset(Data(path=str(path), num_threads=1), make=make, say=said.append)
    return said


def test_videos_too_short_for_a_clip_count_for_no_class(tmp_path: Path) -> None:
    """Or G would be trained on labels that D never sees with a real video."""
    for folder, lengths in (("a", (20, 40)), ("b", (20,)), ("c", (40,))):
        for length in lengths:
            path = write_numbered(tmp_path / folder, "mjpeg", num_frames=length)
            path.rename(path.with_stem(str(length)))
    data = Data(path=str(tmp_path), num_classes=4, num_threads=1)
    index = open_dataset(data, make=True, say=lambda line: None)
    assert describe(index, data).class_counts == (2, 1, 1, 0)
    assert describe(index, data, num_source_frames=20).class_counts == (2, 1, 1, 0)
    assert describe(index, data, num_source_frames=21).class_counts == (1, 0, 1, 0)
    with pytest.raises(UserError, match=r"has 3 classes, but data\.num_classes is 2"):
        describe(index, data.model_copy(update={"num_classes": 2}))


def test_classes_without_videos_are_one_line(tmp_path: Path) -> None:
    for folder, length in (("a", 20), ("b", 5), ("c", 5)):
        write_numbered(tmp_path / folder, "mjpeg", num_frames=length)
    data = Data(path=str(tmp_path), num_classes=3, num_threads=1)
    index = open_dataset(data, make=True, say=lambda line: None)

    def line(num_classes: int | None, num_source_frames: int) -> str | None:
        asked = data.model_copy(update={"num_classes": num_classes})
        return untrained_classes(describe(index, asked, num_source_frames), asked)

    assert line(None, 20) is None
    assert line(3, 5) is None
    untrained = "classes without videos are not trained"
    assert line(4, 5) == f"the data set has 3 classes, data.num_classes is 4; {untrained}"
    assert line(3, 20) == f"2 of 3 have no usable video, e.g. 'b'; {untrained}"
    assert line(4, 20) == (
        "the data set has 3 classes, data.num_classes is 4; 2 of 3 have no usable video, e.g. 'b'; "
        f"{untrained}"
    )


def test_files_that_came_or_went_since_the_index_was_made_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("1", "2"):
        path = write_numbered(tmp_path, "mjpeg", num_frames=5)
        path.rename(path.with_stem(name))
    (tmp_path / "notes.txt").write_text("no video")
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("no UTF-8 either")
    assert opened(tmp_path) == [f"indexing the videos in {tmp_path}"]
    assert opened(tmp_path) == []  # rejects are known too
    for name in ("3", "4"):
        (tmp_path / "1.mkv").with_stem(name).write_bytes((tmp_path / "1.mkv").read_bytes())
    (tmp_path / "2.mkv").unlink()
    assert opened(tmp_path) == [
        f"files in {tmp_path}: 2 not in its index (e.g. 3.mkv), 1 gone from it (e.g. 2.mkv); to "
        "index it again, with the same --annotations and --classes if any: "
        f"python engine/prepare.py {tmp_path} --out {tmp_path / 'index.jsonl'}"
    ]
    assert opened(tmp_path, make=False) == []
    monkeypatch.setattr(dataset, "MAX_FILES_INDEXED_HERE", 1)  # a walk over many files is not free
    assert opened(tmp_path) == []


def test_a_folder_of_which_too_much_is_rejected_is_refused(tmp_path: Path) -> None:
    write_numbered(tmp_path / "videos", "mjpeg", num_frames=5)
    for number in range(3):
        (tmp_path / f"videos/{number}.mp4").write_text("<html>429 Too Many Requests</html>")
        (tmp_path / f"videos/{number}.txt").write_text("a caption is no video")
    data = Data(path=str(tmp_path / "videos"), num_threads=1)

    def open_with(**changes: Any) -> int:
        changed = data.model_copy(update=changes)
        return len(open_dataset(changed, make=True, say=lambda line: None).entries)

    for _ in range(2):  # when it is indexed, and when it was
        with pytest.raises(UserError) as caught:
            open_with()
        assert str(caught.value) == (
            f"3 of 4 videos in {tmp_path / 'videos'} were rejected (75%; data.max_rejected is 0.5),"
            " 3 like 0.mp4: not a video (no mp4, mov, matroska, webm or avi header); "
            f"{tmp_path / 'videos/index.rejects.jsonl'} lists all; mend them and index them again, "
            "or train on the others with --set data.max_rejected=1"
        )
    assert open_with(max_rejected=0.75) == 1
    data = data.model_copy(update={"path": str(tmp_path / "videos/index.jsonl")})
    with pytest.raises(UserError, match="3 of 4 videos"):
        open_with()


def test_the_sample_data_set_is_quiet_once_made(tmp_path: Path) -> None:
    """Its settings lie beside its videos, and are no video that came later."""
    clips = ProceduralClips(num_clips=2, num_frames=3, resolution=16, codec="mjpeg", seed=0)
    data = Data(path=str(tmp_path / "clips"), procedural=clips, num_classes=2, num_threads=1)
    said: list[str] = []
    open_dataset(data, make=True, say=said.append)
    open_dataset(data, make=True, say=said.append)
    assert said == [f"making 2 sample clips in {tmp_path / 'clips'}"]


def test_an_index_of_an_older_version_is_made_again_where_it_is_ours(tmp_path: Path) -> None:
    made = ProceduralClips(num_clips=2, num_frames=4, resolution=16)
    data = Data(path=str(tmp_path / "sample"), num_classes=2, num_threads=1, procedural=made)
    first = open_dataset(data, make=True, say=lambda line: None)
    file = tmp_path / "sample" / dataset.INDEX_NAME
    older = file.read_text().replace(f'"version": {VERSION}', '"version": 2')
    file.write_text(older)
    said: list[str] = []
    assert open_dataset(data, make=True, say=said.append) == first
    assert said == [f"indexing the videos in {data.path} again, in the present format"]
    file.write_text(older)
    with pytest.raises(UserError, match=r"version 2, not .* make it again with engine/prepare"):
        open_dataset(data.model_copy(update={"procedural": None}), make=True, say=said.append)
