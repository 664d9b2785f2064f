"""From what a user names as data to an index: a file, a folder, or the sample data set."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

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
        ensure_procedural(
            path, data.procedural, data.num_classes, say, num_workers=data.num_threads
        )
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


@dataclass(frozen=True)
class DataFacts:
    """What generators need to know of a data set."""

    classes: tuple[str, ...]
    class_counts: tuple[int, ...]
    """Videos per class, for drawing labels as often as the data has them; empty without classes."""
    frames_per_second: float
    """The median video's."""


def describe(index: VideoIndex, data: Data) -> DataFacts:
    """Raises UserError when the data set's classes are not those of the configuration."""
    fps = median(entry.fps for entry in index.entries)
    if data.num_classes is None:
        return DataFacts((), (), fps)
    if len(index.classes) > data.num_classes:
        raise UserError(
            f"the data set has {len(index.classes)} classes, but data.num_classes is "
            f"{data.num_classes}"
        )
    if not index.classes:
        raise UserError(
            f"data.num_classes is {data.num_classes}, but the data set has no class folders; "
            "use --set data.num_classes=null to train without classes"
        )
    counts = Counter(entry.label for entry in index.entries)
    return DataFacts(index.classes, tuple(counts[n] for n in range(data.num_classes)), fps)


def _check_small(folder: Path, index: Path) -> None:
    num_files = sum(1 for file in folder.rglob("*") if file.is_file())
    if num_files > MAX_FILES_INDEXED_HERE:
        raise UserError(
            f"{folder} holds {num_files} files; index them once with: "
            f"python engine/prepare.py {folder} --out {index}"
        )
