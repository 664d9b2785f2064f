"""Making an index: find the videos of a data set, judge each by decoding it, keep the verdicts.

Judging hours of video takes hours, so verdicts are appended to `<name>.partial.jsonl` as they
come: an interrupted run goes on where it stopped, and a second run judges only what has changed.
"""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.durable_files import writing
from engine.errors import UserError
from engine.video.annotated_files import AnnotatedFiles
from engine.video.annotations import CLASS_IND, read_annotations
from engine.video.class_list import ClassList, read_class_list
from engine.video.file_pool import run_all
from engine.video.folders import NOT_INDEXED, Found, files_of
from engine.video.index import (
    Reject,
    VideoEntry,
    VideoIndex,
    as_text,
    header_for,
    indexed_folder,
    load_rejects,
    rejects_path,
    write_lines,
)
from engine.video.inspection import RejectedError, VideoFacts, inspect_video
from engine.video.layouts import ClassFolders
from engine.video.reasons import by_kind

_FACTS = {field.name for field in fields(VideoFacts)}


def build_index(
    root: str | Path,
    out: str | Path,
    *,
    annotations: str | Path | None = None,
    classes: str | Path | None = None,
    follow_symlinks: bool = False,
    num_workers: int = 1,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[VideoIndex, list[Reject]]:
    """Index the videos under `root` into the file `out`, and list rejects beside it.

    Three layouts: a folder of class folders (Kinetics, UCF101: the class is the first folder's
    name); a flat folder (BDD100K: no classes); or, with `annotations`, a Kinetics CSV or UCF101's
    list (`engine.video.annotations`) whose clips lie anywhere below root. A label is a position
    among the classes: those of the file `classes` or of UCF101's classInd.txt in their order, else
    those of the folders or of the whole CSV, sorted by name.

    Symbolic links that lead out of root are rejected, unless `follow_symlinks`.

    `num_workers` processes judge files; 0 judges in this process, which is for files known to be
    harmless, because a crash inside a decoder then ends this process. `say` receives a line where
    classes are told by something else than a user may expect.

    Raises UserError for a missing, empty or unreadable folder, one that is a level too high, an
    unreadable list, no usable video, or an `out` that is something else than an earlier index of
    this folder.
    """
    root, out = Path(root), Path(out)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder of videos")
    if out.is_dir():
        raise UserError(
            f"{out} is a folder; --out names the index file, e.g. {out / 'index.jsonl'}"
        )
    root = root.resolve()
    partial = _partial_path(out)
    check_replaceable(out, root)
    stored_root = header_for(out, root)["root"]
    if as_text(stored_root) != stored_root:
        raise UserError(f"{as_text(str(root))}: the folder's name is not UTF-8; rename it")
    found = files_below(root, out, follow_symlinks=follow_symlinks)
    if not found:
        raise UserError(f"{root} is empty")
    files = [each.path for each in found if not each.leads_out]
    links = [Reject(each.path, NOT_INDEXED) for each in found if each.leads_out]
    listed = None if classes is None else read_class_list(Path(classes))
    layout = _layout(root, files, annotations, listed, say)
    verdicts = _judge(root, layout.to_judge, out, partial, num_workers, progress)
    accepted = {path: v["sha256"] for path, v in verdicts.items() if "reason" not in v}
    class_of, refused = layout.assign(accepted)
    names = layout.class_names(accepted)
    labels: dict[str | None, int | None] = {name: label for label, name in enumerate(names)}
    labels[None] = None
    entries = [VideoEntry(**verdicts[p], label=labels[name]) for p, name in class_of.items()]
    judged = [Reject(**verdict) for verdict in verdicts.values() if "reason" in verdict]
    rejects = links + layout.rejects + judged + refused
    rejects = [replace(reject, path=as_text(reject.path)) for reject in rejects]
    rejects.sort(key=lambda reject: reject.path)
    write_lines(rejects_path(out), map(asdict, rejects))
    if not entries:
        _, example = by_kind(rejects)[0]
        raise UserError(
            f"no usable video in {root}: {len(rejects)} rejected, e.g. {example.path}: "
            f"{example.reason} (all in {rejects_path(out)})"
        )
    index = VideoIndex(root, names, tuple(entries), follow_symlinks)
    index.save(out)
    partial.unlink(missing_ok=True)
    return index, rejects


def files_below(root: Path, index_path: Path, *, follow_symlinks: bool) -> list[Found]:
    """What lies below root, sorted, without the index's own files.

    Raises UserError for a folder that cannot be read: without it a whole class could be missing.
    """
    ours = (index_path, rejects_path(index_path), _partial_path(index_path))
    own = {path.resolve() for path in ours}
    own_names = {path.name for path in own}

    def is_own(path: Path) -> bool:
        return path.name in own_names and path.resolve() in own

    found = files_of(root, follow_symlinks=follow_symlinks)
    return sorted(each for each in found if not is_own(root / each.path))


def check_replaceable(out: Path, root: Path) -> None:
    """UserError where writing `out` would destroy something else, or another folder's verdicts.

    Those of an interrupted run may have no header: older versions wrote none.
    """
    # Only files are looked into: a pipe would block.
    if out.exists() and (not out.is_file() or indexed_folder(out) is None):
        raise UserError(f"{out} is there already and is not a video index; choose another --out")
    for path, what in ((out, "the index"), (_partial_path(out), "an interrupted index")):
        indexed = indexed_folder(path)
        if indexed not in (None, root) and indexed.is_dir():
            raise UserError(f"{path} is {what} of {indexed}, not of {root}; choose another --out")


def _partial_path(index_path: Path) -> Path:
    return index_path.with_name(f"{index_path.stem}.partial.jsonl")


def _layout(
    root: Path,
    files: list[str],
    annotations: str | Path | None,
    listed: ClassList | None,
    say: Callable[[str], None],
) -> AnnotatedFiles | ClassFolders:
    if annotations is None:
        return ClassFolders(root, files, listed)
    read = read_annotations(Path(annotations))
    if read.in_folders and read.classes is None and listed is None:
        say(
            f"no {CLASS_IND} beside {read.file}: its folders are the classes, sorted by name; "
            "--classes FILE gives another order"
        )
    return AnnotatedFiles(read, files, listed)


def _judge(
    root: Path,
    paths: Sequence[str],
    out: Path,
    partial: Path,
    num_workers: int,
    progress: bool,
) -> dict[str, dict[str, Any]]:
    """A verdict for each file: a VideoEntry's fields without the label, or a Reject's."""
    known = _known_verdicts(out, partial)
    verdicts: dict[str, dict[str, Any]] = {}
    todo = []
    for path in paths:
        verdict = known.get(path)
        if verdict is not None and stamp(root / path).items() <= verdict.items():
            verdicts[path] = verdict
        else:
            todo.append(path)
    with writing(partial):
        partial.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("a", encoding="utf-8") as file:
            if not file.tell():
                file.write(json.dumps(header_for(out, root)) + "\n")
            for verdict in tqdm(
                _judge_files(root, todo, num_workers),
                total=len(paths),
                initial=len(paths) - len(todo),
                desc="decoding",
                unit="video",
                disable=not progress,
            ):
                verdicts[verdict["path"]] = verdict
                file.write(json.dumps(verdict) + "\n")
                file.flush()
    return verdicts


def _known_verdicts(out: Path, partial: Path) -> dict[str, dict[str, Any]]:
    """What earlier runs found; what cannot be read is judged again."""
    known: dict[str, dict[str, Any]] = {}
    try:
        for entry in VideoIndex.load(out).entries:
            known[entry.path] = asdict(entry)
            known[entry.path].pop("label")
        for reject in load_rejects(out):
            if reject.reason != NOT_INDEXED:  # it was not looked at
                known[reject.path] = asdict(reject)
    except UserError:
        known = {}
    if partial.exists():
        for line in partial.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                verdict = json.loads(line)
                if "reason" in verdict or verdict.keys() >= _FACTS:  # else an older version's
                    known[verdict["path"]] = verdict
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # the line that the interruption cut
    return known


def _judge_files(root: Path, paths: list[str], num_workers: int) -> Iterator[dict[str, Any]]:
    items = {path: path for path in paths}
    for path, verdict in run_all(functools.partial(_verdict, root), items, num_workers):
        yield verdict or {"path": path, "reason": "crashes the decoder", **stamp(root / path)}


def _verdict(root: Path, path: str) -> dict[str, Any]:
    stamped = stamp(root / path)
    if as_text(path) != path:
        return {"path": path, "reason": "its name is not UTF-8", **stamped}
    try:
        facts: VideoFacts = inspect_video(root / path)
    except RejectedError as rejected:
        return {"path": path, "reason": str(rejected), **stamped}
    except Exception as error:  # one file must not end hours of work
        return {"path": path, "reason": f"cannot be judged: {error!r}", **stamped}
    return {"path": path, **asdict(facts), **stamped}


def stamp(path: Path) -> dict[str, int]:
    """What tells an unchanged file from a changed one without reading it."""
    try:
        status = path.stat()
    except OSError:
        return {"size_bytes": 0, "modified_ns": 0}
    return {"size_bytes": status.st_size, "modified_ns": status.st_mtime_ns}
