"""Making an index: find the videos of a data set, judge each by decoding it, keep the verdicts.

Judging hours of video takes hours, so verdicts are appended to `<name>.partial.jsonl` as they
come: an interrupted run goes on where it stopped, and a second run judges only what has changed.
"""

import contextlib
import csv
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from engine.durable_files import writing
from engine.errors import UserError
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

# Verdicts come in path order within a pool, give or take what each worker holds.
_IN_FLIGHT_PER_WORKER = 4
_FACTS = {field.name for field in fields(VideoFacts)}
# A future takes a kilobyte or two: half a million of them would be a gigabyte.
_FILES_QUEUED = 4096


@dataclass(frozen=True)
class _Candidate:
    path: str  # relative to the root, with forward slashes
    class_name: str | None


def build_index(
    root: str | Path,
    out: str | Path,
    *,
    annotations: str | Path | None = None,
    num_workers: int = 1,
    progress: bool = True,
) -> tuple[VideoIndex, list[Reject]]:
    """Index the videos under `root` into the file `out`, and list rejects beside it.

    Three layouts: a folder of class folders (Kinetics, UCF101: the class is the first folder's
    name); a flat folder (BDD100K: no classes); or, with `annotations`, a Kinetics CSV (columns
    label, youtube_id, time_start, time_end) whose clips `<id>_<start>_<end>.*` or `<id>.*` lie
    anywhere below root. Classes are sorted by name; a label is the position in that order.

    `num_workers` processes judge files; 0 judges in this process, which is for files known to be
    harmless, because a crash inside a decoder then ends this process.

    Raises UserError for a missing, empty or unreadable folder, an unreadable CSV, no usable video,
    or an `out` that is something else than an earlier index of this folder.
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
    _check_replaceable(out, partial, root)
    stored_root = header_for(out, root)["root"]
    if as_text(stored_root) != stored_root:
        raise UserError(f"{as_text(str(root))}: the folder's name is not UTF-8; rename it")
    files = files_below(root, out)
    if not files:
        raise UserError(f"{root} is empty")
    if annotations is not None:
        candidates, rejects = _from_annotations(Path(annotations), files)
    else:
        candidates, rejects = _from_folders(files)
    classes = tuple(sorted({c.class_name for c in candidates if c.class_name is not None}))
    for name in classes:
        if as_text(name) != name:
            raise UserError(f"{root / as_text(name)}: the class's name is not UTF-8; rename it")
    labels: dict[str | None, int | None] = {name: label for label, name in enumerate(classes)}
    labels[None] = None

    verdicts = _judge(root, candidates, out, partial, num_workers, progress)
    entries = []
    for candidate in candidates:
        verdict = verdicts[candidate.path]
        if "reason" in verdict:
            rejects.append(Reject(**verdict))
        else:
            entries.append(VideoEntry(**verdict, label=labels[candidate.class_name]))
    rejects = [replace(reject, path=as_text(reject.path)) for reject in rejects]
    rejects.sort(key=lambda reject: reject.path)
    write_lines(rejects_path(out), map(asdict, rejects))
    if not entries:
        first = rejects[0]
        raise UserError(
            f"no usable video in {root}: {len(rejects)} rejected, e.g. {first.path}: "
            f"{first.reason} (all in {rejects_path(out)})"
        )
    index = VideoIndex(root, classes, tuple(entries))
    index.save(out)
    partial.unlink(missing_ok=True)
    return index, rejects


def files_below(root: Path, index_path: Path) -> list[str]:
    """All files below root, sorted, relative to it, but hidden ones and the index's own.

    Raises UserError for a folder that cannot be read: without it a whole class could be missing.
    """
    own = (index_path, rejects_path(index_path), _partial_path(index_path))
    skip = {path.resolve() for path in own}
    found, seen = [], set()
    skip_names = {path.name for path in skip}
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_unreadable):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a folder above would lead round for ever
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in names:
            path = Path(folder, name)
            ours = name in skip_names and path.resolve() in skip
            if not name.startswith(".") and not ours:
                found.append(path.relative_to(root).as_posix())
    return sorted(found)


def _unreadable(error: OSError) -> NoReturn:
    raise UserError(f"cannot read {error.filename}: {error.strerror}")


def _check_replaceable(out: Path, partial: Path, root: Path) -> None:
    """UserError where writing `out` would destroy something else, or another folder's verdicts.

    Those of an interrupted run may have no header: older versions wrote none.
    """
    # Only files are looked into: a pipe would block.
    if out.exists() and (not out.is_file() or indexed_folder(out) is None):
        raise UserError(f"{out} is there already and is not a video index; choose another --out")
    for path, what in ((out, "the index"), (partial, "an interrupted index")):
        indexed = indexed_folder(path)
        if indexed not in (None, root) and indexed.is_dir():
            raise UserError(f"{path} is {what} of {indexed}, not of {root}; choose another --out")


def _partial_path(index_path: Path) -> Path:
    return index_path.with_name(f"{index_path.stem}.partial.jsonl")


def _from_folders(files: list[str]) -> tuple[list[_Candidate], list[Reject]]:
    in_folders = [path for path in files if "/" in path]
    if not in_folders:
        return [_Candidate(path, None) for path in files], []
    loose = [Reject(path, "lies outside the class folders") for path in files if "/" not in path]
    return [_Candidate(path, path.partition("/")[0]) for path in in_folders], loose


def _from_annotations(table: Path, files: list[str]) -> tuple[list[_Candidate], list[Reject]]:
    """Candidates by a Kinetics CSV; rows without a file and files without a row become rejects."""
    by_stem: dict[str, list[str]] = {}
    for path in files:
        by_stem.setdefault(Path(path).stem, []).append(path)
    labels: dict[str, str] = {}
    rejects, matched = [], set()
    for number, row in _rows(table):
        try:
            start, end = (int(float(row[column])) for column in ("time_start", "time_end"))
        except (ValueError, OverflowError):
            raise UserError(
                f"{table}, line {number}: time_start and time_end must be numbers of seconds"
            ) from None
        stem = f"{row['youtube_id']}_{start:06d}_{end:06d}"
        paths = by_stem.get(stem) or by_stem.get(row["youtube_id"]) or []
        matched.update(paths)
        if not paths:
            rejects.append(Reject(stem, f"missing (line {number} of the annotations)"))
        elif len(paths) > 1:
            rejects.append(Reject(paths[0], f"ambiguous: {len(paths)} files have this name"))
        elif labels.setdefault(paths[0], row["label"]) != row["label"]:
            raise UserError(
                f"{table}, line {number}: {paths[0]} is already labelled {labels[paths[0]]!r}"
            )
    rejects += [Reject(path, "not in the annotations") for path in files if path not in matched]
    return [_Candidate(path, labels[path]) for path in sorted(labels)], rejects


def _rows(table: Path) -> Iterator[tuple[int, dict[str, str]]]:
    columns = ("label", "youtube_id", "time_start", "time_end")
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise UserError(
                    f"{table} has no column {missing[0]!r}; a Kinetics CSV has {', '.join(columns)}"
                )
            for row in reader:
                if any(not row[name] for name in columns):
                    raise UserError(f"{table}, line {reader.line_num}: a column is empty")
                yield reader.line_num, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        what = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot read the annotations {table}: {what}") from None


def _judge(
    root: Path,
    candidates: Sequence[_Candidate],
    out: Path,
    partial: Path,
    num_workers: int,
    progress: bool,
) -> dict[str, dict[str, Any]]:
    """A verdict for each candidate: a VideoEntry's fields without the label, or a Reject's."""
    known = _known_verdicts(out, partial)
    verdicts: dict[str, dict[str, Any]] = {}
    todo = []
    for candidate in candidates:
        verdict = known.get(candidate.path)
        if verdict is not None and _stamp(root / candidate.path).items() <= verdict.items():
            verdicts[candidate.path] = verdict
        else:
            todo.append(candidate.path)
    with writing(partial):
        partial.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("a", encoding="utf-8") as file:
            if not file.tell():
                file.write(json.dumps(header_for(out, root)) + "\n")
            for verdict in tqdm(
                _judge_files(root, todo, num_workers),
                total=len(candidates),
                initial=len(candidates) - len(todo),
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
    if num_workers == 0:
        yield from (_verdict(root, path) for path in paths)
        return
    while paths:
        judged = set()
        for verdict in _in_processes(root, paths, num_workers):
            judged.add(verdict["path"])
            yield verdict
        # A file crashed a decoder, and its process with it. It is among the first that are left.
        paths = [path for path in paths if path not in judged]
        num_suspects = _IN_FLIGHT_PER_WORKER * num_workers
        for path in paths[:num_suspects]:
            verdicts = list(_in_processes(root, [path], 1))
            crash = {"path": path, "reason": "crashes the decoder", **_stamp(root / path)}
            yield verdicts[0] if verdicts else crash
        paths = paths[num_suspects:]


def _in_processes(root: Path, paths: list[str], num_workers: int) -> Iterator[dict[str, Any]]:
    """Verdicts as they come; fewer than `paths` when a worker died."""
    # Spawned, because the caller may hold threads and CUDA, which do not survive a fork.
    pool = ProcessPoolExecutor(
        num_workers, multiprocessing.get_context("spawn"), initializer=_ignore_interrupts
    )
    try:
        for first in range(0, len(paths), _FILES_QUEUED):
            queued = paths[first : first + _FILES_QUEUED]
            for future in as_completed([pool.submit(_verdict, root, path) for path in queued]):
                with contextlib.suppress(BrokenProcessPool):
                    yield future.result()
    except BrokenProcessPool:
        return  # a pool that is broken takes no more
    finally:
        pool.shutdown(cancel_futures=True)


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle


def _verdict(root: Path, path: str) -> dict[str, Any]:
    stamp = _stamp(root / path)
    if as_text(path) != path:
        return {"path": path, "reason": "its name is not UTF-8", **stamp}
    try:
        facts: VideoFacts = inspect_video(root / path)
    except RejectedError as rejected:
        return {"path": path, "reason": str(rejected), **stamp}
    return {"path": path, **asdict(facts), **stamp}


def _stamp(path: Path) -> dict[str, int]:
    """What tells an unchanged file from a changed one without reading it."""
    try:
        status = path.stat()
    except OSError:
        return {"size_bytes": 0, "modified_ns": 0}
    return {"size_bytes": status.st_size, "modified_ns": status.st_mtime_ns}
