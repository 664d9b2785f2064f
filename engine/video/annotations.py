"""Official lists of clips: Kinetics-400, -600 and -700's CSVs and UCF101's train and test lists.

`read_annotations` reads one; `engine.video.annotated_files` finds the files that its rows name.
"""

import csv
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from engine.errors import UserError
from engine.video.class_list import ClassList, lines_of, read_class_list, read_text
from engine.video.reasons import VIDEO_SUFFIXES

CLASS_IND = "classInd.txt"
_COLUMNS = ("label", "youtube_id", "time_start", "time_end")
_CLIP = re.compile(r"(.+)_(\d+)(?:\.\d+)?_(\d+)(?:\.\d+)?")
_LINE = re.compile(r"(.*?\S)(?:\s+(\d+))?")


@dataclass(frozen=True, slots=True)
class AnnotationRow:
    """One clip of a list, and the names that its file may have, without endings."""

    line: int
    class_name: str
    shown: str
    """The name to tell a user."""
    exact: str
    """ID_000010_000020; of UCF101, with its folder, archery/v_archery_g01_c01."""
    loose: str
    """ID; of UCF101, v_archery_g01_c01."""


@dataclass(frozen=True)
class Annotations:
    """A list of clips."""

    file: Path
    rows: tuple[AnnotationRow, ...]
    in_folders: bool
    """Whether rows name files in class folders, as UCF101's do, and not ids and times."""
    classes: ClassList | None = None
    """Fixed by classInd.txt beside the list; None where the rows' classes are all there are."""

    def names_of(self, path: str) -> tuple[str, str]:
        """What a row's `exact` and `loose` names must be to name the file at `path`."""
        return _listed_names(path) if self.in_folders else _kinetics_names(path)


def read_annotations(file: Path) -> Annotations:
    """Read a Kinetics CSV (columns label, youtube_id, time_start, time_end, and any others) or a
    UCF101 list (lines "Class/video.avi 1" or "Class/video.avi", classInd.txt beside it).

    Raises UserError, with the line's number, for what is neither.
    """
    text = read_text(file, "the annotations")
    lines = lines_of(text)
    first = lines[0][1] if lines else ""
    if "/" not in first and ("," in first or first in ("", *_COLUMNS)):
        return Annotations(file, tuple(_kinetics_rows(file, text)), in_folders=False)
    beside = file.with_name(CLASS_IND)
    classes = read_class_list(beside) if beside.is_file() else None
    rows = tuple(_listed_rows(file, lines, classes))
    return Annotations(file, rows, in_folders=True, classes=classes)


def _kinetics_rows(file: Path, text: str) -> Iterator[AnnotationRow]:
    reader = csv.DictReader(io.StringIO(text), skipinitialspace=True)
    try:
        missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
        if missing == ["label"]:
            raise UserError(
                f"{file} has no column 'label': a test list without labels names no classes; use "
                "one with labels, or prepare the videos without --annotations"
            )
        if missing:
            raise UserError(
                f"{file} has no column {missing[0]!r}; a Kinetics CSV has {', '.join(_COLUMNS)}, "
                "a UCF101 list lines such as 'Archery/video.avi 3'"
            )
        for cells in reader:
            yield _kinetics_row(file, reader.line_num, cells)
    except csv.Error as error:
        raise UserError(f"cannot read the annotations {file}: {error}") from None


def _kinetics_row(file: Path, line: int, cells: Mapping[str, str | None]) -> AnnotationRow:
    label, youtube_id, *times = ((cells[column] or "").strip() for column in _COLUMNS)
    if not (label and youtube_id and all(times)):
        raise UserError(f"{file}, line {line}: a column is empty")
    try:
        start, end = (int(float(text)) for text in times)
    except (ValueError, OverflowError):
        raise UserError(
            f"{file}, line {line}: time_start and time_end must be numbers of seconds"
        ) from None
    name = _clip_name(youtube_id, start, end)
    return AnnotationRow(line, label, shown=name, exact=name, loose=youtube_id)


def _listed_rows(
    file: Path, lines: list[tuple[int, str]], classes: ClassList | None
) -> Iterator[AnnotationRow]:
    for line, text in lines:
        match = _LINE.fullmatch(text)
        assert match is not None, "a line is not blank"
        path, number = PurePosixPath(match[1]), match[2]
        if not path.parent.name:
            raise UserError(
                f"{file}, line {line}: no class folder in {text!r}; a UCF101 list has lines such "
                "as 'Archery/video.avi 3', a Kinetics CSV the columns " + ", ".join(_COLUMNS)
            )
        exact, loose = _listed_names(match[1])
        labels = [path.parent.name]
        if classes is not None and number is not None:
            labels.append(_numbered_class(classes, int(number)))
        # Where folder and number disagree, the clip has two labels, which is told as such.
        for label in dict.fromkeys(labels):
            yield AnnotationRow(line, label, shown=match[1], exact=exact, loose=loose)


def _numbered_class(classes: ClassList, number: int) -> str:
    in_range = 1 <= number <= len(classes.names)
    return classes.names[number - 1] if in_range else f"class {number}"


def parts_of(stem: str) -> tuple[str, int, int] | None:
    """Id, start and end in seconds, of a clip's name with times, padded or not; None of others."""
    match = _CLIP.fullmatch(stem)
    return (match[1], int(match[2]), int(match[3])) if match else None


def stem_of(path: str) -> str:
    """The file's name without its ending, or endings: youtube-dl makes "ID.mp4.webm"."""
    stem = PurePosixPath(path).stem
    while (inner := PurePosixPath(stem)).suffix.lower() in VIDEO_SUFFIXES:
        stem = inner.stem
    return stem


def _clip_name(youtube_id: str, start: int, end: int) -> str:
    return f"{youtube_id}_{start:06d}_{end:06d}"


def _kinetics_names(path: str) -> tuple[str, str]:
    stem = stem_of(path)
    parts = parts_of(stem)
    return _clip_name(*parts) if parts else stem, stem


def _listed_names(path: str) -> tuple[str, str]:
    """In lower case: copies of UCF101 spell v_HandStandPushups in two ways."""
    stem = stem_of(path).lower()
    return f"{PurePosixPath(path).parent.name.lower()}/{stem}", stem
