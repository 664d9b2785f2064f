"""From what a user names as data to an index: a file, a folder, or the sample data set."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from engine.configuration import Data
from engine.errors import UserError
from engine.processors import cores_per_process
from engine.video.index import VideoIndex, as_text, is_outdated, load_rejects, rejects_path
from engine.video.indexing import build_index, files_below
from engine.video.procedural import ensure_procedural
from engine.video.reasons import by_kind, unusable

INDEX_NAME = "index.jsonl"
MAX_FILES_INDEXED_HERE = 2000
"""More than this decode for so long that a user should start it deliberately."""


def open_dataset(data: Data, *, make: bool, say: Callable[[str], None]) -> VideoIndex:
    """The index of `data.path`: a file, `index.jsonl` in a folder, or one made now.

    Only the rank with `make` writes anything (the sample data set, the index of a small folder)
    and says what has changed in a small folder since; the others call this once it has. Raises
    UserError with one line, also where more than `data.max_rejected` of the videos were rejected.
    """
    index, index_path = _opened(data, make, say)
    _check_rejected(index, index_path, data.max_rejected)
    return index


def _opened(data: Data, make: bool, say: Callable[[str], None]) -> tuple[VideoIndex, Path]:
    """The index, and its file."""
    if data.path is None:
        raise UserError("no data: name an index or a folder of videos with --data PATH")
    path, workers = Path(data.path), data.num_threads or cores_per_process()
    if data.procedural is not None and make:
        if data.num_classes is None:
            raise UserError("data.procedural needs data.num_classes")
        ensure_procedural(path, data.procedural, data.num_classes, say, num_workers=workers)
    if path.is_file():
        return VideoIndex.load(path), path
    if not path.is_dir():
        raise UserError(f"no data at {path}: neither an index nor a folder of videos")
    index_path = path / INDEX_NAME
    # The sample set's is ours to make again; another one's options are not known here.
    outdated = data.procedural is not None and is_outdated(index_path)
    if make and (outdated or not index_path.exists()):
        _check_small(path, index_path)
        say(f"indexing the videos in {path}{' again, in the present format' if outdated else ''}")
        _, rejects = build_index(path, index_path, num_workers=workers, progress=False)
        if rejected := unusable(rejects):
            _, example = by_kind(rejected)[0]
            say(
                f"{len(rejected)} videos are left out, e.g. {example.path}: {example.reason}; "
                f"{rejects_path(index_path)} lists all"
            )
        return VideoIndex.load(index_path), index_path
    index = VideoIndex.load(index_path)
    if make and data.procedural is None and len(index.entries) <= MAX_FILES_INDEXED_HERE:
        _say_changes(index, index_path, say)
    return index, index_path


def _check_rejected(index: VideoIndex, index_path: Path, most: float) -> None:
    rejected = unusable(load_rejects(index_path))
    num_videos = len(index.entries) + len(rejected)
    if len(rejected) <= most * num_videos:
        return
    count, example = by_kind(rejected)[0]
    raise UserError(
        f"{len(rejected)} of {num_videos} videos in {index.root} were rejected "
        f"({len(rejected) / num_videos:.0%}; data.max_rejected is {most:g}), {count} like "
        f"{example.path}: {example.reason}; {rejects_path(index_path)} lists all; mend them and "
        f"index them again, or train on the others with --set data.max_rejected=1"
    )


def held_out(data: Data) -> Data | None:
    """The sample data set with another seed, made beside it: clips that nothing was trained on.

    None for any other data set, whose held-out clips only its user knows.
    """
    if data.procedural is None or data.path is None:
        return None
    path = Path(data.path)
    return data.model_copy(
        update={
            "path": str(path.with_name(f"{path.name}-held-out")),
            "procedural": data.procedural.model_copy(update={"seed": data.procedural.seed + 1}),
        }
    )


@dataclass(frozen=True)
class DataFacts:
    """What generators need to know of a data set."""

    classes: tuple[str, ...]
    class_counts: tuple[int, ...]
    """Usable videos per class, to draw labels as often as D sees them; empty without classes."""
    frames_per_second: float
    """The median video's."""


def describe(index: VideoIndex, data: Data, num_source_frames: int = 1) -> DataFacts:
    """What a stage whose clips span `num_source_frames` finds: shorter videos do not count.

    Raises UserError when the data set's classes are not those of the configuration.
    """
    fps = median(entry.fps for entry in index.entries)
    if data.num_classes is None:
        return DataFacts((), (), fps)
    if len(index.classes) > data.num_classes:
        raise UserError(
            f"the data set has {len(index.classes)} classes, but data.num_classes is "
            f"{data.num_classes}; raise it, or list fewer with engine/prepare.py --classes FILE"
        )
    if not index.classes:
        raise UserError(
            f"data.num_classes is {data.num_classes}, but the data set has no class folders; "
            "use --set data.num_classes=null to train without classes"
        )
    counts = Counter(e.label for e in index.entries if e.num_frames >= num_source_frames)
    return DataFacts(index.classes, tuple(counts[n] for n in range(data.num_classes)), fps)


def untrained_classes(facts: DataFacts, data: Data) -> str | None:
    """A line that tells which of data.num_classes classes have no videos; None where all have."""
    if data.num_classes is None or all(facts.class_counts):
        return None
    num_named, parts = len(facts.classes), []
    if num_named < data.num_classes:
        counted = f"{num_named} class{'es' if num_named > 1 else ''}"
        parts = [f"the data set has {counted}, data.num_classes is {data.num_classes}"]
    # One count more than names for every class that the data set does not know.
    named = zip(facts.classes, facts.class_counts, strict=False)
    if unused := [name for name, count in named if not count]:
        parts.append(f"{len(unused)} of {num_named} have no usable video, e.g. {unused[0]!r}")
    return "; ".join([*parts, "classes without videos are not trained"])


def _check_small(folder: Path, index: Path) -> None:
    num_files = sum(1 for file in folder.rglob("*") if file.is_file())
    if num_files > MAX_FILES_INDEXED_HERE:
        raise UserError(
            f"{folder} holds {num_files} files; index them once with: {_prepare(folder, index)}"
        )


def _say_changes(index: VideoIndex, index_path: Path, say: Callable[[str], None]) -> None:
    """Which files are new or gone since the index was made.

    Said, not done: a run on another data set cannot be continued exactly.
    """
    below = files_below(index.root, index_path, follow_symlinks=index.follow_symlinks)
    found = {as_text(each.path) for each in below}
    used = {entry.path for entry in index.entries}
    new = sorted(found - used - {reject.path for reject in load_rejects(index_path)})
    gone = sorted(used - found)
    changes = [
        f"{len(files)} {what} (e.g. {files[0]})"
        for files, what in ((new, "not in its index"), (gone, "gone from it"))
        if files
    ]
    if changes:
        say(
            f"files in {index.root}: {', '.join(changes)}; to index it again, with the same "
            f"--annotations and --classes if any: {_prepare(index.root, index_path)}"
        )


def _prepare(folder: Path, index: Path) -> str:
    return f"python engine/prepare.py {folder} --out {index}"
