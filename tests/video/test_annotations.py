"""Official lists of clips: which files they name, and what is no reason to lose a good clip."""

from collections.abc import Callable
from pathlib import Path

import pytest
from numbered_videos import write_numbered

from engine.errors import UserError
from engine.video import indexing
from engine.video.index import VideoIndex, load_rejects
from engine.video.indexing import build_index
from engine.video.inspection import inspect_video

KINETICS = "label,youtube_id,time_start,time_end,split\n"
ID, OTHER_ID = "-a_bcDEF0_9", "zZ345678901"  # of 11 characters, as YouTube's
NO_VIDEO = "not a video"


def clip(path: Path, num_frames: int = 5) -> Path:
    """A good video there; another number of frames makes it another one."""
    written = write_numbered(path.parent / ".made", "mjpeg", num_frames=num_frames)
    written.replace(path)
    return path


class Prepared:
    """What became of the files in `folder`, by a list that says `text`."""

    def __init__(
        self, folder: Path, text: str, *, name: str = "list", classes: Path | None = None
    ) -> None:
        self.out = folder.parent / "index.jsonl"
        self.said: list[str] = []
        table = folder.parent / name
        table.write_bytes(text.encode())
        build_index(
            folder,
            self.out,
            annotations=table,
            classes=classes,
            num_workers=0,
            progress=False,
            say=self.said.append,
        )

    @property
    def classes(self) -> tuple[str, ...]:
        return VideoIndex.load(self.out).classes

    @property
    def labelled(self) -> dict[str, str]:
        """The class of each accepted file."""
        index = VideoIndex.load(self.out)
        return {e.path: index.classes[e.label] for e in index.entries if e.label is not None}

    @property
    def reasons(self) -> dict[str, str]:
        return {reject.path: reject.reason for reject in load_rejects(self.out)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of one good clip."""
    clip(tmp_path / "clips" / f"{ID}_000059_000069.mkv")
    return tmp_path / "clips"


ROW = f"archery,{ID},59,69,train\n"
GOOD = {f"{ID}_000059_000069.mkv": "archery"}


@pytest.mark.parametrize(
    ("beside", "content", "reason"),
    [
        ("{id}_000059_000069.txt", b"a caption", NO_VIDEO),
        ("{id}_000059_000069.jpg", b"\xff\xd8\xff\xe0 a thumbnail", NO_VIDEO),
        ("{id}_000059_000069.wav", b"RIFF\x24\0\0\0WAVEfmt ", NO_VIDEO),
        ("{id}_000059_000069.mp4", b"", NO_VIDEO),
        ("{id}.txt", b"a caption of the whole", NO_VIDEO),
        ("{id}.mp4", b"", NO_VIDEO),
        # Before the good one in path order, and of its very name.
        ("#broken/{id}_000059_000069.mkv", b"", NO_VIDEO),
        ("{id}_000059_000069.info.json", b"{}", "not in the annotations"),
    ],
)
def test_what_lies_beside_a_clip_costs_nothing(
    folder: Path, beside: str, content: bytes, reason: str
) -> None:
    path = beside.format(id=ID)
    (folder / path).parent.mkdir(exist_ok=True)
    (folder / path).write_bytes(content)
    found = Prepared(folder, KINETICS + ROW)
    assert found.labelled == GOOD
    assert list(found.reasons) == [path]
    assert found.reasons[path].startswith(reason)


def test_a_good_replacement_stands_in_for_a_truncated_clip(folder: Path) -> None:
    """Kinetics-400's mirror has folders of clips, and one of replacements for corrupted ones."""
    truncated = clip(folder / "train" / f"{OTHER_ID}_000001_000011.mkv", num_frames=40)
    truncated.write_bytes(truncated.read_bytes()[: truncated.stat().st_size // 2])
    good = f"replacement/{OTHER_ID}_000001_000011.mkv"
    clip(folder / good)
    found = Prepared(folder, KINETICS + ROW + f"bowling,{OTHER_ID},1,11,train\n")
    assert found.labelled == {**GOOD, good: "bowling"}
    assert list(found.reasons) == [f"train/{OTHER_ID}_000001_000011.mkv"]


def test_two_different_good_files_of_a_row_cost_both_and_no_other(folder: Path) -> None:
    for name, num_frames in (("a", 6), ("b", 7)):
        clip(folder / name / f"{OTHER_ID}_000001_000011.mkv", num_frames)
    found = Prepared(folder, KINETICS + ROW + f"bowling,{OTHER_ID},1,11,train\n")
    assert found.labelled == GOOD
    a, b = (f"{name}/{OTHER_ID}_000001_000011.mkv" for name in "ab")
    assert found.reasons == {
        a: f"another usable video has its name: {b!r}",
        b: f"another usable video has its name: {a!r}",
    }


def test_a_conflict_that_was_resolved_is_judged_again(folder: Path) -> None:
    twin = clip(folder / "a" / f"{ID}_000059_000069.mkv", num_frames=6)
    with pytest.raises(UserError, match=r"no usable video .* another usable video has its name"):
        Prepared(folder, KINETICS + ROW)
    twin.unlink()
    assert Prepared(folder, KINETICS + ROW).labelled == GOOD


def test_of_equal_files_the_first_is_taken(folder: Path) -> None:
    first, second = f"{ID}_000059_000069.mkv", f"twin/{ID}_000059_000069.mkv"
    (folder / second).parent.mkdir()
    (folder / second).write_bytes((folder / first).read_bytes())
    found = Prepared(folder, KINETICS + ROW)
    assert found.labelled == GOOD
    assert found.reasons == {second: f"duplicate of {first!r}"}


def test_a_file_of_two_labels_costs_itself_alone(folder: Path) -> None:
    """A video named by its id alone, of which two clips are listed."""
    clip(folder / f"{OTHER_ID}.mkv")
    rows = f"cutting apple,{OTHER_ID},64,74,val\npeeling apples,{OTHER_ID},14,24,val\n"
    found = Prepared(folder, KINETICS + rows + ROW)
    assert found.labelled == GOOD
    assert found.reasons == {
        f"{OTHER_ID}.mkv": "has 2 labels in the annotations: 'cutting apple' (line 2), "
        "'peeling apples' (line 3)"
    }
    one_label = rows.replace("peeling apples", "cutting apple")
    found = Prepared(folder, KINETICS + one_label + ROW)
    assert found.labelled == {**GOOD, f"{OTHER_ID}.mkv": "cutting apple"}


def test_a_name_with_times_goes_before_the_id_alone(folder: Path) -> None:
    whole = f"{ID}.mkv"
    clip(folder / whole, num_frames=6)
    found = Prepared(folder, KINETICS + ROW)
    assert found.labelled == GOOD
    assert found.reasons == {whole: f"its row has a file already: '{ID}_000059_000069.mkv'"}
    (folder / whole).write_bytes((folder / f"{ID}_000059_000069.mkv").read_bytes())
    assert "duplicate of" in Prepared(folder, KINETICS + ROW).reasons[whole]


@pytest.mark.parametrize(
    "name",
    [
        "{id}_000059_000069.mp4.webm",
        "{id}_000059_000069.MP4.mkv",
        "{id}_59_69.mp4",
        "{id}_0059_69.mkv",
        "{id}_59.0_69.0.mp4",
        "{id}.mp4.mkv",
        "deep/er/{id}_000059_000069.avi",
    ],
)
def test_other_spellings_of_a_name(tmp_path: Path, name: str) -> None:
    path = name.format(id=ID)
    clip(tmp_path / "clips" / path)
    assert Prepared(tmp_path / "clips", KINETICS + ROW).labelled == {path: "archery"}


@pytest.mark.parametrize("name", ["{id}_000058_000069.mkv", "A title [{id}].mkv", "v_{id}.mp4"])
def test_a_video_under_a_name_that_no_row_has_gets_a_hint(folder: Path, name: str) -> None:
    path = name.format(id=OTHER_ID)
    clip(folder / path)
    found = Prepared(folder, KINETICS + ROW + f"bowling,{OTHER_ID},59,69,train\n")
    assert found.reasons[path] == (
        f"not in the annotations; a clip of this video is called '{OTHER_ID}_000059_000069' there"
    )


def test_files_that_no_row_names_are_not_decoded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip(folder / f"{OTHER_ID}_000001_000011.mkv")
    judged: list[str] = []

    def counted(path: Path) -> object:
        judged.append(path.name)
        return inspect_video(path)

    monkeypatch.setattr(indexing, "inspect_video", counted)
    found = Prepared(folder, KINETICS + ROW)
    assert judged == [f"{ID}_000059_000069.mkv"]
    assert found.reasons == {f"{OTHER_ID}_000001_000011.mkv": "not in the annotations"}


def test_a_row_is_missing_where_only_a_caption_is_there(folder: Path) -> None:
    (folder / f"{OTHER_ID}_000001_000011.txt").write_text("a caption")
    rows = ROW + f"bowling,{OTHER_ID},1,11,train\n"
    missing = f"{OTHER_ID}_000001_000011"
    found = Prepared(folder, KINETICS + rows)
    assert found.reasons[missing] == "missing (line 3 of the annotations)"
    (folder / f"{missing}.mp4").write_bytes(b"")  # there, for a reason of its own
    found = Prepared(folder, KINETICS + rows)
    assert set(found.reasons) == {f"{missing}.mp4", f"{missing}.txt"}


@pytest.mark.parametrize(
    "text",
    [
        f"label,youtube_id,time_start,time_end,split\narchery,{ID},59,69,train\n",
        f'label,youtube_id,time_start,time_end,split,is_cc\n"archery",{ID},59,69,val,1\n',
        f"\ufefflabel,youtube_id,time_start,time_end\r\narchery,{ID},59.0,69.0\r\n",
        f"split,time_end,time_start,youtube_id,label,notes\ntrain,69,59,{ID},archery,\n",
    ],
    ids=["600, 700", "400", "without split", "other columns"],
)
def test_forms_of_kinetics_lists(folder: Path, text: str) -> None:
    assert Prepared(folder, text, name="train.csv").labelled == GOOD


def test_all_of_a_lists_classes_are_there_whatever_was_downloaded(folder: Path) -> None:
    """Or training and validation videos would have other labels."""
    rows = f"abseiling,{OTHER_ID},1,11,train\n" + ROW + f"zumba,{OTHER_ID},31,41,train\n"
    assert Prepared(folder, KINETICS + rows).classes == ("abseiling", "archery", "zumba")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"youtube_id,time_start,time_end,split\n{ID},59,69,test\n", "a test list without labels"),
        (f"archery,{ID},59,69,train\n", "no column 'label'; a Kinetics CSV has"),
        ("1 ApplyEyeMakeup\n2 Archery\n", "line 1: no class folder in '1 ApplyEyeMakeup'"),
        ("{}\n", "line 1: no class folder"),
    ],
)
def test_what_is_no_list_of_labels_is_one_line(folder: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Prepared(folder, text, name="test.csv")
    assert "\n" not in str(caught.value)


# UCF101. Its numbers are not the alphabet's here, so that an order that was not read would show.
CLASS_IND = "1 YoYo\r\n2 HandstandPushups\r\n3 Archery\r\n"
UCF_FILES = (
    "Archery/v_Archery_g01_c01.avi",
    "Archery/v_Archery_g08_c01.avi",
    "HandstandPushups/v_HandStandPushups_g08_c01.avi",
    "YoYo/v_YoYo_g01_c02.avi",
)


@pytest.fixture
def ucf(tmp_path: Path) -> Path:
    """UCF-101 beside its lists, as unpacked; a part of its videos."""
    for path in UCF_FILES:
        clip(tmp_path / "UCF-101" / path)
    (tmp_path / "classInd.txt").write_bytes(CLASS_IND.encode())
    return tmp_path / "UCF-101"


TRAIN_LIST = (
    "Archery/v_Archery_g08_c01.avi 3\r\n"
    "HandstandPushups/v_HandstandPushups_g08_c01.avi 2\r\n"
    "YoYo/v_YoYo_g08_c01.avi 1\r\n"
)


def test_ucf101s_lists(ucf: Path) -> None:
    train = Prepared(ucf, TRAIN_LIST, name="trainlist01.txt")
    assert train.classes == ("YoYo", "HandstandPushups", "Archery")
    assert train.labelled == {UCF_FILES[1]: "Archery", UCF_FILES[2]: "HandstandPushups"}
    assert train.said == []
    assert train.reasons == {
        UCF_FILES[0]: "not in the annotations",
        UCF_FILES[3]: "not in the annotations",
        "YoYo/v_YoYo_g08_c01.avi": "missing (line 3 of the annotations)",
    }
    tested = Prepared(ucf, f"{UCF_FILES[0]}\r\n{UCF_FILES[3]}\r\n", name="testlist01.txt")
    assert tested.classes == train.classes
    assert tested.labelled == {UCF_FILES[0]: "Archery", UCF_FILES[3]: "YoYo"}


def test_ucf101s_list_without_class_numbers_beside_it(ucf: Path) -> None:
    (ucf.parent / "classInd.txt").unlink()
    found = Prepared(ucf, TRAIN_LIST, name="trainlist01.txt")
    assert found.classes == ("Archery", "HandstandPushups", "YoYo")
    (line,) = found.said
    assert "no classInd.txt beside" in line


def test_ucf101_in_one_folder_and_encoded_again(tmp_path: Path, ucf: Path) -> None:
    for path in UCF_FILES:
        clip(tmp_path / "flat" / Path(path).with_suffix(".mp4").name)
    found = Prepared(tmp_path / "flat", TRAIN_LIST, name="trainlist01.txt")
    assert sorted(found.labelled.values()) == ["Archery", "HandstandPushups"]


def test_a_number_of_another_class_is_a_second_label(ucf: Path) -> None:
    text = TRAIN_LIST.replace("g08_c01.avi 3", "g08_c01.avi 1")
    found = Prepared(ucf, text, name="trainlist01.txt")
    assert found.labelled == {UCF_FILES[2]: "HandstandPushups"}
    assert found.reasons[UCF_FILES[1]] == (
        "has 2 labels in the annotations: 'Archery' (line 1), 'YoYo' (line 1)"
    )


def test_a_file_of_the_same_name_in_another_class_is_another_video(tmp_path: Path) -> None:
    for name in ("a/01", "b/01", "b/02", "unlisted/01"):
        clip(tmp_path / "v" / f"{name}.avi")
    (tmp_path / "v/a/01.avi").write_bytes(b"")
    found = Prepared(tmp_path / "v", "a/01.avi\nb/02.avi\n", name="testlist01.txt")
    assert found.labelled == {"b/02.avi": "b"}
    for gone in ("b/02", "a/01", "unlisted/01"):  # then no file is where the list has it
        (tmp_path / "v" / f"{gone}.avi").unlink()
    with pytest.raises(UserError, match=r"no usable video .* b/01\.avi: not in the annotations"):
        Prepared(tmp_path / "v", "a/01.avi\nb/02.avi\n", name="testlist01.txt")


# A class list goes before a list's own classes.


def class_list(folder: Path, *names: str) -> Path:
    file = folder.parent / "classes.txt"
    file.write_text("".join(f"{name}\n" for name in names))
    return file


def test_a_class_list_fixes_the_labels_and_leaves_other_classes_out(folder: Path) -> None:
    clip(folder / f"{OTHER_ID}_000001_000011.mkv")
    rows = ROW + f"bowling,{OTHER_ID},1,11,train\nbowling,{OTHER_ID},21,31,train\n"
    found = Prepared(folder, KINETICS + rows, classes=class_list(folder, "zumba", "archery"))
    assert found.classes == ("zumba", "archery")
    assert found.labelled == GOOD
    # Clips of other classes are not missed.
    assert found.reasons == {
        f"{OTHER_ID}_000001_000011.mkv": "its class 'bowling' is not in classes.txt"
    }


def test_a_class_list_goes_before_ucf101s(ucf: Path) -> None:
    listed = class_list(ucf, "Archery", "YoYo")
    found = Prepared(ucf, TRAIN_LIST, name="trainlist01.txt", classes=listed)
    assert found.classes == ("Archery", "YoYo")
    assert found.labelled == {UCF_FILES[1]: "Archery"}
    assert found.reasons[UCF_FILES[2]] == "its class 'HandstandPushups' is not in classes.txt"


@pytest.mark.parametrize("write", [Path.unlink, lambda file: file.write_bytes(b"\xff\xfe\xff")])
def test_a_list_that_cannot_be_read_is_named(folder: Path, write: Callable[[Path], object]) -> None:
    file = class_list(folder, "archery")
    write(file)
    with pytest.raises(UserError, match=f"cannot read the class list {file}: "):
        Prepared(folder, KINETICS + ROW, classes=file)
