"""The index of a data set: which videos there are, what each holds, and the file that keeps it.

JSON lines: a header (format, version, root, classes), then one video per line. What was rejected
stands beside it in `<name>.rejects.jsonl`. `engine.video.indexing.build_index` makes both.
"""

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from engine.durable_files import put_in_place, writing
from engine.errors import UserError
from engine.video.inspection import VideoFacts
from engine.video.keyframes import unpack

FORMAT, VERSION = "ssw-gan video index", 4
# Beyond any file that was judged; without limits a damaged index could ask for terabytes.
_MOST_FRAMES, _MOST_PIXELS = 2**31 - 1, 2**18
_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, slots=True)
class VideoEntry(VideoFacts):
    """One video of a data set: what a full decode found when the index was made, and where."""

    path: str
    """Relative to the index's root, with forward slashes."""
    label: int | None
    """Position in the index's classes; None without classes."""
    size_bytes: int
    modified_ns: int

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


@dataclass(frozen=True, slots=True)
class Reject:
    """A file that cannot be trained on, and why; sizes are 0 when it is missing."""

    path: str
    reason: str
    size_bytes: int = 0
    modified_ns: int = 0

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


@dataclass(frozen=True, slots=True)
class _Header:
    format: str
    version: int
    root: str
    classes: list[str]
    follow_symlinks: bool = False

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


_HEADER, _ENTRY, _REJECT = TypeAdapter(_Header), TypeAdapter(VideoEntry), TypeAdapter(Reject)


@dataclass(frozen=True)
class VideoIndex:
    """The accepted videos of a data set, in a fixed order, and its classes (empty when none)."""

    root: Path
    classes: tuple[str, ...]
    entries: tuple[VideoEntry, ...]
    follow_symlinks: bool = False
    """Whether symbolic links that lead out of root may be read."""

    def path(self, number: int) -> Path:
        """The absolute path of entry `number`."""
        return self.root / self.entries[number].path

    def fingerprint(self) -> str:
        """A hash of what training can see: paths, contents, how they are read, and labels.

        Not of where the files lie.
        """
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for entry in self.entries:
            read = entry.num_frames, entry.width, entry.height, entry.rotation, entry.matrix
            digest.update(json.dumps([entry.path, entry.sha256, entry.label, *read]).encode())
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the index; a reader sees the old file or the whole new one, never a part.

        A root at or below the index's own folder is stored relative to it: both can move together.
        """
        path = Path(path)
        header = header_for(path, self.root, self.classes, follow_symlinks=self.follow_symlinks)
        write_lines(path, [header, *(asdict(entry) for entry in self.entries)])

    @classmethod
    def load(cls, path: str | Path) -> "VideoIndex":
        """Read and check an index. Raises UserError: one line with the file, line and remedy."""
        path = Path(path)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            what = getattr(error, "strerror", None) or "not text"
            raise UserError(
                f"cannot read the video index {path}: {what}; make one with engine/prepare.py"
            ) from None
        try:
            header = _HEADER.validate_json(lines[0] if lines else "")
        except ValidationError:
            raise UserError(
                f"{path} is not a video index; make one with engine/prepare.py"
            ) from None
        if (header.format, header.version) != (FORMAT, VERSION):
            raise UserError(
                f"{path} is {header.format!r} version {header.version}, not '{FORMAT}' version "
                f"{VERSION}; make it again with engine/prepare.py"
            )
        if _climbs(header.root):
            raise UserError(
                f"{path}, line 1: root {header.root!r} leads out of the index's own folder; "
                f"make it again with engine/prepare.py"
            )
        entries = []
        for number, line in enumerate(lines[1:], start=2):
            try:
                entries.append(parse_entry(line, len(header.classes)))
            except ValueError as error:  # pydantic's ValidationError is one
                raise UserError(f"{path}, line {number}: {_first(error)}") from None
        if not entries:
            raise UserError(f"{path} lists no videos")
        root = path.parent.resolve() / header.root
        return cls(root, tuple(header.classes), tuple(entries), header.follow_symlinks)


def header_for(
    path: Path, root: Path, classes: Iterable[str] = (), *, follow_symlinks: bool = False
) -> dict[str, Any]:
    """The first line of the index of `root` at `path`."""
    try:
        stored = root.resolve().relative_to(path.parent.resolve()).as_posix()
    except ValueError:
        stored = str(root.resolve())
    return asdict(_Header(FORMAT, VERSION, stored, list(classes), follow_symlinks))


def indexed_folder(path: Path) -> Path | None:
    """Which folder the index at `path` is of, of whatever version; None where it is no index."""
    header = _header(path)
    return None if header is None else (path.parent / header.root).resolve()


def is_outdated(path: Path) -> bool:
    """Whether there is an index of an older version at `path`."""
    header = _header(path)
    return header is not None and header.version < VERSION


def _header(path: Path) -> _Header | None:
    try:
        with path.open(encoding="utf-8") as file:
            header = _HEADER.validate_json(file.readline())
    except (OSError, ValueError):
        return None
    return header if header.format == FORMAT and not _climbs(header.root) else None


def _climbs(root: str) -> bool:
    """Whether it is no root that `header_for` writes: one in the index's folder, or absolute."""
    return ".." in PurePosixPath(root).parts or "\0" in root


def as_text(path: str) -> str:
    """The path; with escapes where it is not UTF-8, as an index can hold and a console show it."""
    return path.encode(errors="backslashreplace").decode()


def rejects_path(index_path: Path) -> Path:
    """Where the rejects of the index at `index_path` are listed."""
    return index_path.with_name(f"{index_path.stem}.rejects.jsonl")


def load_rejects(index_path: Path) -> list[Reject]:
    """The rejects listed beside an index; none when there is no list."""
    path = rejects_path(index_path)
    try:
        return [_REJECT.validate_json(line) for line in path.read_text("utf-8").splitlines()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {_first(error)}; remove it") from None


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines aside and rename them into place when they are on the disk."""
    aside = path.with_name(f".{path.name}.writing")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("w", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record) + "\n")
        put_in_place(aside, path)


def parse_entry(line: str, num_classes: int) -> VideoEntry:
    """A video's line. Raises ValueError for what `VideoIndex.save` does not write."""
    entry = _ENTRY.validate_json(line)
    path = PurePosixPath(entry.path)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in entry.path:
        raise ValueError(f"path {entry.path!r} leads out of the data set")
    if entry.label is None and num_classes:
        raise ValueError("label is missing")
    if entry.label is not None and not 0 <= entry.label < num_classes:
        raise ValueError(f"label {entry.label}, but there are {num_classes} classes")
    if min(entry.num_frames, entry.width, entry.height) < 1 or not 0 < entry.fps < math.inf:
        raise ValueError("num_frames, width, height and fps must be positive")
    if entry.num_frames > _MOST_FRAMES or max(entry.width, entry.height) > _MOST_PIXELS:
        raise ValueError("num_frames, width or height is more than any video's")
    if entry.rotation not in (0, 90, 180, 270):
        raise ValueError(f"rotation {entry.rotation} is no quarter turn")
    unpack(entry.keyframes)
    return entry


def _first(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return ".".join(str(part) for part in (*first["loc"], "")) + f" {first['msg']}"
    return str(error)
