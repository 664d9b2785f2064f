"""Small copies of a data set's videos at the size that is trained on, and their index.

Windows of the copies cost a fraction of the sources' CPU time. The folder of copies is

    archery/a.mp4.mkv        the copy of archery/a.mp4, with the same frames under the same numbers
    .copies.jsonl            what the copies are of, and with which settings they were made
    .source.jsonl            the index of the sources
    .unfinished/             what is being written
    .lock                    held by the run that writes

A copy is written to `.unfinished`, checked, renamed into place and only then listed in
`.copies.jsonl`. So an interrupted run goes on where it stopped. It makes a copy anew if the source
has another content, or if the copy is not the file that was listed.
"""

import errno
import fcntl
import functools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from engine.durable_files import make_writable_folder, put_on_disk, remove_folder, writing
from engine.errors import UserError
from engine.video.containers import RejectedError
from engine.video.copying import copy_video, start_worker
from engine.video.encoding import DEFAULT_CODEC, ENCODINGS, Codec
from engine.video.file_pool import run_all
from engine.video.index import (
    Reject,
    VideoEntry,
    VideoIndex,
    as_text,
    parse_entry,
    rejects_path,
    write_lines,
)
from engine.video.indexing import build_index, check_replaceable, stamp
from engine.video.reasons import by_kind

_FORMAT, _VERSION = "ssw-gan video copies", 1
_JOURNAL, _SOURCES, _UNFINISHED = ".copies.jsonl", ".source.jsonl", ".unfinished"
_LOCK = ".lock"
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # some clusters' file systems
_LONGEST_NAME = 255  # bytes, of Linux's file systems
_FIELDS = {field.name for field in fields(VideoEntry)} - {"label"}


@dataclass(frozen=True)
class Copies:
    """A finished set of copies."""

    index: VideoIndex
    rejects: list[Reject]
    """The sources that were rejected, and those whose copy was; under the sources' paths."""
    num_made: int
    """How many copies this run made; the others were there."""


def build_copies(
    root: str | Path,
    out: str | Path,
    folder: str | Path,
    *,
    size: int,
    codec: Codec = DEFAULT_CODEC,
    annotations: str | Path | None = None,
    classes: str | Path | None = None,
    follow_symlinks: bool = False,
    num_workers: int = 1,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Copies:
    """Copy the usable videos under `root` into `folder`, and index the copies into the file `out`.

    A copy's shorter side is `size` pixels: the training's resolution, at which nothing is left to
    resize. A smaller source is not enlarged. Classes, labels and numbers of frames are the
    sources'. The other arguments are those of `engine.video.indexing.build_index`, which judges the
    sources. A copy that fails is rejected and tried again by the next run; files of sources that
    are gone stay in the folder and out of the index.

    Raises UserError as `build_index` does, and for a `folder` that is not apart from `root`, holds
    something else or copies made with other settings, or cannot be written.
    """
    root, out, folder = Path(root).resolve(), Path(out), Path(folder).resolve()
    settings = _settings(root, size, codec)
    _check(root, out, folder, settings)
    make_writable_folder(folder)
    with _alone_in(folder, say):
        _check_ours(folder, settings)  # again: another run may just have ended
        known = _known(folder)
        _write_journal(folder, settings, known)
        sources, rejects = build_index(
            root,
            folder / _SOURCES,
            annotations=annotations,
            classes=classes,
            follow_symlinks=follow_symlinks,
            num_workers=num_workers,
            progress=progress,
            say=say,
        )
        kept = {
            entry.path: known[entry.path]
            for entry in sources.entries
            if entry.path in known and known[entry.path].is_of(entry, folder)
        }
        job = _Job(sources, folder, size, codec, progress, num_workers)
        copies, refused = _copy_all(job, kept)
        rejects += refused
        return Copies(_finish(job, out, copies, rejects), rejects, len(copies) - len(kept))


@dataclass(frozen=True)
class _Copy:
    """A copy in place: an index's entry without its label, and the content that it was made of."""

    source_sha256: str
    facts: dict[str, Any]

    def is_of(self, source: VideoEntry, folder: Path) -> bool:
        """Whether it shows what the source shows now, and its file is as it was written."""
        there = stamp(folder / self.facts["path"]).items() <= self.facts.items()
        return there and self.source_sha256 == source.sha256


@dataclass(frozen=True)
class _Job:
    sources: VideoIndex
    folder: Path
    size: int
    codec: Codec
    progress: bool
    num_workers: int

    def copy_path(self, path: str) -> str:
        # The whole name, because a.mp4 and a.avi may lie side by side.
        return f"{path}.{ENCODINGS[self.codec].suffix}"


@contextmanager
def _alone_in(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the folder's lock, which ends with the process; UserError where another run has it."""
    with writing(folder):
        file = (folder / _LOCK).open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another engine/prepare.py is writing to {folder}: wait for it, or give another "
                "folder"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise UserError(f"cannot lock {folder / _LOCK}: {error.strerror}") from None
            say(f"{folder} cannot be locked: start no second run while this one writes there")
        yield


class _Item(NamedTuple):
    source: Path
    entry: VideoEntry
    unfinished: Path


def _check(root: Path, out: Path, folder: Path, settings: dict[str, Any]) -> None:
    if not root.is_dir():
        raise UserError(f"{root} is not a folder of videos")
    if folder == root or folder in root.parents or root in folder.parents:
        raise UserError(
            f"--transcode {folder} and {root} lie one in the other; give a folder beside the videos"
        )
    if out.is_dir():
        raise UserError(
            f"{out} is a folder; --out names the index file, e.g. {out / 'index.jsonl'}"
        )
    if root in out.resolve().parents:
        raise UserError(f"{out} lies among the videos of {root}, and is of their copies; move it")
    if out.resolve().parent == folder and out.name in (_JOURNAL, _SOURCES, _UNFINISHED, _LOCK):
        raise UserError(f"{out} is a file of the copies' own; choose another --out")
    check_replaceable(out, folder)
    if as_text(str(folder)) != str(folder):
        raise UserError(f"{as_text(str(folder))}: the folder's name is not UTF-8; choose another")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--transcode {folder} is a file; give a folder")
    _check_ours(folder, settings)


def _check_ours(folder: Path, settings: dict[str, Any]) -> None:
    """UserError for a folder of other things, or of copies that were made otherwise."""
    journal = folder / _JOURNAL
    try:
        with journal.open(encoding="utf-8") as file:
            made_with = json.loads(file.readline())
    except (FileNotFoundError, NotADirectoryError):
        if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise UserError(
                f"--transcode {folder} holds other files; give an empty or a new folder"
            ) from None
        return
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {journal}: {getattr(error, 'strerror', None) or 'damaged'}; remove "
            f"{folder} or give another folder"
        ) from None
    for name, value in settings.items():
        was = made_with.get(name) if isinstance(made_with, dict) else None
        # A data set may move, but two of them do not share a folder.
        if was != value and not (name == "source" and was and not Path(was).is_dir()):
            raise UserError(
                f"--transcode {folder} holds copies made with {name} {was}, not {value}; give "
                "another folder, or remove it"
            )


def _settings(root: Path, size: int, codec: Codec) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "source": as_text(str(root)),
        "size": size,
        "codec": codec,
        "encoder's options": ENCODINGS[codec].options,
    }


def _known(folder: Path) -> dict[str, _Copy]:
    """The copies that earlier runs listed, by their sources' paths."""
    known = {}
    try:
        lines = (folder / _JOURNAL).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return {}
    for line in lines[1:]:
        try:
            record = json.loads(line)
            if record["facts"].keys() == _FIELDS:  # else an older version's
                parse_entry(json.dumps({**record["facts"], "label": None}), 0)
                known[record["path"]] = _Copy(record["source_sha256"], record["facts"])
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # the line that the interruption cut
    return known


def _record(path: str, copy: _Copy) -> dict[str, Any]:
    return {"path": path, **asdict(copy)}


def _write_journal(folder: Path, settings: dict[str, Any], copies: dict[str, _Copy]) -> None:
    records = (_record(path, copy) for path, copy in copies.items())
    write_lines(folder / _JOURNAL, iter([settings, *records]))


def _copy_all(job: _Job, kept: dict[str, _Copy]) -> tuple[dict[str, _Copy], list[Reject]]:
    """The copies by their sources' paths, `kept` ones and new ones, and why others have none."""
    copies, refused = dict(kept), []
    journal = job.folder / _JOURNAL
    num_sources = len(job.sources.entries)
    with writing(journal), journal.open("a", encoding="utf-8") as file:
        for entry, verdict in tqdm(
            _verdicts(job, [e for e in job.sources.entries if e.path not in kept]),
            total=num_sources,
            initial=len(kept),
            desc="copying",
            unit="video",
            disable=not job.progress,
        ):
            if "reason" in verdict:
                stamped = {"size_bytes": entry.size_bytes, "modified_ns": entry.modified_ns}
                refused.append(Reject(entry.path, verdict["reason"], **stamped))
                continue
            copies[entry.path] = _Copy(entry.sha256, verdict)
            file.write(json.dumps(_record(entry.path, copies[entry.path])) + "\n")
            file.flush()
    return copies, refused


def _verdicts(job: _Job, todo: list[VideoEntry]) -> Iterator[tuple[VideoEntry, dict[str, Any]]]:
    """Each source with its copy's facts, when that is in place, or with a reason."""
    unfinished = job.folder / _UNFINISHED
    remove_folder(unfinished)  # what a run that was killed left
    make_writable_folder(unfinished)
    entries = {entry.path: entry for entry in todo}
    items = {}
    for number, entry in enumerate(todo):
        path = job.copy_path(entry.path)
        if len(os.fsencode(path.rpartition("/")[2])) > _LONGEST_NAME:
            yield entry, {"reason": "its name is too long for a copy, which has a longer one"}
            continue
        # A killed run's last workers may end after the next run has begun.
        aside = unfinished / f"{os.getpid()}-{number}"
        items[entry.path] = _Item(job.sources.root / entry.path, entry, aside)
    work = functools.partial(_verdict, job.codec, job.size)
    try:
        with closing(run_all(work, items, job.num_workers, start_worker)) as verdicts:
            for name, verdict in verdicts:
                if verdict is None:
                    verdict = {"reason": "crashes the decoder or the encoder"}
                elif "reason" not in verdict:
                    verdict["path"] = job.copy_path(name)
                    _put_in_place(items[name].unfinished, job.folder / verdict["path"])
                yield entries[name], verdict
    finally:
        remove_folder(unfinished)  # a full disk has use for the space


def _put_in_place(unfinished: Path, copy: Path) -> None:
    with writing(copy):
        copy.parent.mkdir(parents=True, exist_ok=True)
        unfinished.replace(copy)


def _verdict(codec: Codec, size: int, item: _Item) -> dict[str, Any]:
    """A checked copy's facts and stamp, or a reason; then there is no file."""
    try:
        facts = copy_video(item.source, item.entry, item.unfinished, codec, size)
        if stamp(item.source).items() <= asdict(item.entry).items():
            with writing(item.unfinished.parent):
                put_on_disk(item.unfinished)
            return {**asdict(facts), **stamp(item.unfinished)}
        reason = "has changed while it was copied"
    except UserError:
        item.unfinished.unlink(missing_ok=True)
        raise
    except RejectedError as rejected:
        reason = str(rejected)
    except Exception as error:  # one file must not end hours of work
        reason = f"cannot be copied: {error!r}"
    item.unfinished.unlink(missing_ok=True)
    return {"reason": reason}


def _finish(job: _Job, out: Path, copies: dict[str, _Copy], rejects: list[Reject]) -> VideoIndex:
    """Write the index of the copies, in the sources' order, and the list of rejects beside it."""
    rejects.sort(key=lambda reject: reject.path)
    write_lines(rejects_path(out), map(asdict, rejects))
    sources = job.sources
    entries = tuple(
        VideoEntry(**copies[entry.path].facts, label=entry.label)
        for entry in sources.entries
        if entry.path in copies
    )
    if not entries:
        _, example = by_kind(rejects)[0]
        raise UserError(
            f"no usable copy of {sources.root}: {len(rejects)} rejected, e.g. {example.path}: "
            f"{example.reason} (all in {rejects_path(out)})"
        )
    index = VideoIndex(job.folder, sources.classes, entries)
    index.save(out)
    return index
