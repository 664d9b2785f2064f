"""From what a user names as data to an index: a file, a folder, or the sample data set."""

from collections.abc import Callable
from pathlib import Path

from engine.configuration import Data
from engine.errors import UserError
from engine.video.index import VideoIndex
from engine.video.indexing import build_index
from engine.video.procedural import ensure_procedural

INDEX_NAME = "index.jsonl"
MAX_FILES_INDEXED_HERE = 2000
"""More than this decode for so long that a user should start it deliberately."""


def open_dataset(data: Data, *, make: bool, say: Callable[[str], None]) -> VideoIndex:
    """The index of `data.path`: a file, `index.jsonl` in a folder, or one made now.

    Only the rank with `make` writes anything (the sample data set, the index of a small folder);
    the others call this once it has. Raises UserError with one line.
    """
    if data.path is None:
        raise UserError("no data: name an index or a folder of videos with --data PATH")
    path = Path(data.path)
    if data.procedural is not None and make:
        if data.num_classes is None:
            raise UserError("data.procedural needs data.num_classes")
        ensure_procedural(path, data.procedural, data.num_classes, say)
    if path.is_file():
        return VideoIndex.load(path)
    if not path.is_dir():
        raise UserError(f"no data at {path}: neither an index nor a folder of videos")
    index = path / INDEX_NAME
    if not index.exists() and make:
        _check_small(path, index)
        say(f"indexing the videos in {path}")
        build_index(path, index, num_workers=data.num_threads, progress=False)
    return VideoIndex.load(index)


def _check_small(folder: Path, index: Path) -> None:
    num_files = sum(1 for file in folder.rglob("*") if file.is_file())
    if num_files > MAX_FILES_INDEXED_HERE:
        raise UserError(
            f"{folder} holds {num_files} files; index them once with: "
            f"python engine/prepare.py {folder} --out {index}"
        )
