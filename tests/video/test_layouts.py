"""Which folders are classes, a list that fixes them, and folders that are one level too high."""

from pathlib import Path

import pytest
from numbered_videos import write_numbered

from engine.errors import UserError
from engine.video.class_list import read_class_list
from engine.video.index import Reject, VideoIndex, load_rejects
from engine.video.indexing import build_index
from engine.video.layouts import check_level
from engine.video.reasons import by_kind


def index_of(root: Path, classes: Path | None = None) -> VideoIndex:
    out = root.parent / "index.jsonl"
    return build_index(root, out, classes=classes, num_workers=0, progress=False)[0]


def labelled(index: VideoIndex) -> dict[str, str]:
    return {e.path: index.classes[e.label] for e in index.entries if e.label is not None}


def listing(file: Path, text: str) -> Path:
    file.write_bytes(text.encode())
    return file


UCF = ("UCF-101/Archery/v_1.avi", "UCF-101/Biking/v_2.avi", "ucfTrainTestlist/trainlist01.txt")


def splits(names: str, right: str) -> str:
    return (
        f"root holds splits ({names}), not classes: give root/{right}, or, where these are "
        "classes, list them in engine/prepare.py --classes FILE"
    )


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            UCF,
            "root has one folder, UCF-101, which holds only folders (Archery, Biking): give "
            "root/UCF-101, or, where UCF-101 is a class, list it in",
        ),
        (("train/a.mov", "val/b.mov", "test/c.mov"), splits("test, train, val", "train")),
        (("train/x/a.mp4", "val/x/b.mp4"), splits("train, val", "train")),
        (("valid/x/a.mp4", "testing/x/b.mp4"), splits("testing, valid", "testing")),
        (("Validation/a.mp4", "ann/v.csv"), splits("Validation", "Validation")),
        (("k_train/x/a.mp4", "k_val/x/b.mp4"), splits("k_train, k_val", "k_train")),
        (("train_256/x/a.mp4", "val_256/x/b.mp4"), splits("train_256, val_256", "train_256")),
        # Two names of splits are enough beside anything else.
        (
            ("train/x/a.mp4", "val/x/b.mp4", "tiny/x/c.mp4"),
            splits("train, val", "train"),
        ),
        (
            ("train/x/a.mp4", "replacement_for_corrupted/b.mp4"),
            splits("train", "train"),
        ),
        # Two levels too high.
        (
            ("videos/train/a.mov", "videos/val/b.mov", "labels/train/a.json"),
            "has one folder, videos, which holds only folders (train, val): give root/videos/train",
        ),
        (("data/ucf/Archery/a.avi", "data/ucf/Biking/b.avi"), ": give root/data/ucf,"),
    ],
)
def test_a_folder_one_level_too_high_names_the_right_one(
    files: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        check_level(Path("root"), sorted(files))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "files",
    [
        ("a/1.mp4", "b/2.mp4"),
        ("a/1.mp4", "b/deep/2.mp4"),
        ("a/x/1.mp4", "b/x/2.mp4"),
        ("a/1.mp4", "a/deep/2.mp4"),  # one class
        ("a/1.mp4", "notes/deep/x.txt"),
        ("1.mp4", "2.mp4"),
        ("car/1.mp4", "bus/1.mp4", "train/1.mp4"),  # vehicles
        ("training dog/1.mp4", "testifying/1.mp4"),  # classes of Kinetics
        ("training_dog/1.mp4", "test_drive/2.mp4", "walking_dog/3.mp4"),
        ("testing", "training"),  # no folders
    ],
)
def test_a_right_level_is_let_pass(files: tuple[str, ...]) -> None:
    check_level(Path("root"), sorted(files))


def test_classes_named_like_splits_can_be_listed(tmp_path: Path) -> None:
    root = tmp_path / "v"
    for name in ("test", "train"):
        write_numbered(root / name / "day 1", "mjpeg", num_frames=5)
    with pytest.raises(UserError, match="holds splits"):
        index_of(root)
    index = index_of(root, listing(tmp_path / "c.txt", "train\ntest\n"))
    assert labelled(index) == {"test/day 1/mjpeg.mkv": "test", "train/day 1/mjpeg.mkv": "train"}


def test_a_class_list_does_not_excuse_the_wrong_level(tmp_path: Path) -> None:
    write_numbered(tmp_path / "v" / "train" / "archery", "mjpeg", num_frames=5)
    listed = listing(tmp_path / "c.txt", "archery\n")
    with pytest.raises(UserError, match=r"holds splits \(train\)"):
        index_of(tmp_path / "v", listed)


def test_the_level_is_told_before_anything_is_decoded(tmp_path: Path) -> None:
    write_numbered(tmp_path / "v" / "train", "mjpeg", num_frames=5)
    with pytest.raises(UserError):
        index_of(tmp_path / "v")
    assert not list(tmp_path.glob("index*"))


def test_a_folder_without_videos_is_no_class(tmp_path: Path) -> None:
    """But one whose videos are all damaged is, or the labels behind it would shift."""
    root = tmp_path / "v"
    for name in ("archery", "bowling"):
        write_numbered(root / name, "mjpeg", num_frames=5)
    (root / "annotations").mkdir()
    (root / "annotations" / "train.csv").write_text("x")
    (root / "abseiling").mkdir()
    (root / "abseiling" / "a.mp4").write_text("x")
    assert index_of(root).classes == ("abseiling", "archery", "bowling")
    assert {reject.path for reject in load_rejects(tmp_path / "index.jsonl")} == {
        "annotations/train.csv",
        "abseiling/a.mp4",
    }


def test_a_folder_of_other_files_beside_flat_videos(tmp_path: Path) -> None:
    """BDD100K's labels, say, beside its videos."""
    root = tmp_path / "v"
    write_numbered(root, "mjpeg", num_frames=5)
    (root / "labels").mkdir()
    (root / "labels" / "a.json").write_text("{}")
    index = index_of(root)
    assert (index.classes, [entry.path for entry in index.entries]) == ((), ["mjpeg.mkv"])
    (reject,) = load_rejects(tmp_path / "index.jsonl")
    assert (reject.path, reject.reason) == ("labels/a.json", "lies in a folder beside the videos")


def test_names_need_no_ending(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "v" / "a", "mjpeg", num_frames=5)
    path.rename(path.with_suffix(""))
    assert labelled(index_of(tmp_path / "v")) == {"a/mjpeg": "a"}


# A class list.


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("b\na\n\n c d \n", ("b", "a", "c d")),
        ("\ufeffb\r\na", ("b", "a")),
        ("1 b\n2 a c\n", ("b", "a c")),
        ("2 a\n1 b\n", ("b", "a")),  # numbers, not lines, give the order
        ("3 point shot\nslam dunk\n", ("3 point shot", "slam dunk")),
        ("1\n0\n", ("1", "0")),
    ],
)
def test_forms_of_class_lists(tmp_path: Path, text: str, names: tuple[str, ...]) -> None:
    assert read_class_list(listing(tmp_path / "c.txt", text)).names == names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n \n", "lists no classes"),
        ("a\nb\na\n", "lists the class 'a' twice"),
        ("1 a\n2 a\n", "lists the class 'a' twice"),
        ("1 a\n3 b\n", "2 classes are numbered, but not from 1 to 2"),
        ("0 a\n1 b\n", "2 classes are numbered, but not from 1 to 2"),
        ("1 a\n1 b\n", "2 classes are numbered, but not from 1 to 2"),
    ],
)
def test_bad_class_lists(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_class_list(listing(tmp_path / "c.txt", text))


def test_a_class_list_fixes_the_labels_of_a_part(tmp_path: Path) -> None:
    root = tmp_path / "v"
    for name in ("bowling", "yodeling", "zumba"):
        write_numbered(root / name, "mjpeg", num_frames=5)
    assert index_of(root).classes == ("bowling", "yodeling", "zumba")
    index = index_of(root, listing(tmp_path / "c.txt", "1 archery\n2 zumba\n3 bowling\n"))
    assert index.classes == ("archery", "zumba", "bowling")
    assert labelled(index) == {"bowling/mjpeg.mkv": "bowling", "zumba/mjpeg.mkv": "zumba"}
    assert [(r.path, r.reason) for r in load_rejects(tmp_path / "index.jsonl")] == [
        ("yodeling/mjpeg.mkv", "its class 'yodeling' is not in c.txt")
    ]


def test_a_flat_folder_has_no_classes_to_list(tmp_path: Path) -> None:
    write_numbered(tmp_path / "v", "mjpeg", num_frames=5)
    with pytest.raises(UserError, match="has no class folders for the classes of"):
        index_of(tmp_path / "v", listing(tmp_path / "c.txt", "a\n"))


# Which reasons are told first.


def test_reasons_are_told_in_the_order_of_what_they_say() -> None:
    rejects = [
        *(Reject(f"{n}", f"missing (line {n} of the annotations)") for n in range(9)),
        *(Reject(f"{n}.txt", "not a video") for n in range(8)),
        *(Reject(f"{n}.mp4", "not in the annotations") for n in range(7)),
        Reject("a.mp4", "has no frame rate"),
        *(Reject(f"b{n}.mp4", f"damaged after {n} frames") for n in (0, 333)),
        *(Reject(f"c{n}.mp4", f"duplicate of 'd{n}.mp4'") for n in "xyz"),
    ]
    assert [(count, reject.path) for count, reject in by_kind(rejects)] == [
        (3, "cx.mp4"),
        (2, "b0.mp4"),
        (1, "a.mp4"),
        (7, "0.mp4"),
        (8, "0.txt"),
        (9, "0"),
    ]


def test_no_usable_video_gives_the_reason_that_matters(tmp_path: Path) -> None:
    root = tmp_path / "v"
    root.mkdir()
    for name in ("a.txt", "b.txt", "c_000001_000002.mp4", "not-listed.mp4"):
        (root / name).write_text("x")
    table = tmp_path / "list.csv"
    rows = [f"x,{name},1,2\n" for name in "abcdef"]
    table.write_text("label,youtube_id,time_start,time_end\n" + "".join(rows))
    with pytest.raises(UserError, match=r"e\.g\. c_000001_000002\.mp4: not a video"):
        build_index(root, tmp_path / "i.jsonl", annotations=table, num_workers=0, progress=False)
