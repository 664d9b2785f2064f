"""The files that annotations name: which of them there are, and which of those are the clips.

Only files that could be decoded can be clips: a caption, a thumbnail or a damaged copy with a good
clip's name costs nothing. Where two good files claim one name, or one file two
labels, those files are left out, and the index is made of the others.
"""

from collections.abc import Callable, Iterator, Mapping

from engine.video.annotations import Annotations, parts_of, stem_of
from engine.video.class_list import ClassList
from engine.video.index import Reject
from engine.video.reasons import DUPLICATE, MISSING, NOT_LISTED, looks_like_video

_YOUTUBE_ID_LENGTH = 11


class AnnotatedFiles:
    """The files that annotations name, anywhere below a folder; a file has one name at most.

    With `listed`, which goes before the annotations' own class list, other classes are left out.
    """

    def __init__(
        self, annotations: Annotations, files: list[str], listed: ClassList | None
    ) -> None:
        self._rows = annotations.rows
        self._listed = listed or annotations.classes
        self._lines_of: dict[str, dict[str, int]] = {}  # name -> class -> its first line
        for row in self._rows:
            for called in (row.exact, row.loose):
                self._lines_of.setdefault(called, {}).setdefault(row.class_name, row.line)
        self._files_of: dict[str, list[str]] = {}  # name -> files, in path order
        self.to_judge: list[str] = []
        """Files to decode, sorted."""
        self.rejects: list[Reject] = []
        """Files that no row of a wanted class names."""
        hint = _hints(annotations)
        for path, name in self._named(annotations, files):
            if name is None:
                self.rejects.append(Reject(path, f"{NOT_LISTED}{hint(path)}"))
                continue
            self._files_of.setdefault(name, []).append(path)
            unwanted = [c for c in self._lines_of[name] if not self._wanted(c)]
            if self._listed is not None and len(unwanted) == len(self._lines_of[name]):
                self.rejects.append(Reject(path, self._listed.leaves_out(unwanted[0])))
            else:
                self.to_judge.append(path)

    def assign(self, accepted: Mapping[str, str]) -> tuple[dict[str, str | None], list[Reject]]:
        """The class of each clip among the accepted files (path -> SHA-256), in path order.

        Also why other accepted files are none, and the rows that no file bears the name of.
        """
        of_path: dict[str, str | None] = {}
        rejects: list[Reject] = []
        usable = {
            name: [path for path in files if path in accepted]
            for name, files in self._files_of.items()
        }
        taken = self._taken(usable)
        for name, files in usable.items():
            kept: dict[str, str] = {}  # SHA-256 -> the first such file
            for path in files:
                first = kept.setdefault(accepted[path], path)
                if first != path:
                    rejects.append(Reject(path, f"{DUPLICATE} {first!r}"))
            for path in kept.values():
                reason = self._refused(name, path, list(kept.values()), taken, accepted)
                if reason is None:
                    (of_path[path],) = self._lines_of[name]
                else:
                    rejects.append(Reject(path, reason))
        return dict(sorted(of_path.items())), rejects + list(self._missing(accepted))

    def class_names(self, accepted: Mapping[str, str]) -> tuple[str, ...]:
        """The fixed classes, else all that the rows have: a download of a part shifts no label."""
        if self._listed is not None:
            return self._listed.names
        return tuple(sorted({row.class_name for row in self._rows}))

    def _wanted(self, class_name: str) -> bool:
        return self._listed is None or class_name in self._listed

    def _named(
        self, annotations: Annotations, files: list[str]
    ) -> Iterator[tuple[str, str | None]]:
        """Each file and the name by which rows call it."""
        exact_names = {row.exact for row in self._rows}
        names = [annotations.names_of(path) for path in files]
        # Other folders than the list's are fine for ids, and for videos of UCF101 in none of its
        # class folders; but b/01.avi is not the a/01.avi that is listed.
        folders = {_folder(exact) for exact in exact_names} if annotations.in_folders else set()
        exactly = annotations.in_folders and any(exact in exact_names for exact, _ in names)
        for path, (exact, loose) in zip(files, names, strict=True):
            if exact in exact_names:
                yield path, exact
            elif loose in self._lines_of and not exactly and _folder(exact) not in folders:
                yield path, loose
            else:
                yield path, None

    def _taken(self, usable: Mapping[str, list[str]]) -> dict[str, str]:
        """The loose names all of whose rows have a file of their exact name, and one such file."""
        taken: dict[str, str] = {}
        open_names = set()
        for row in self._rows:
            if found := usable.get(row.exact):
                taken.setdefault(row.loose, found[0])
            else:
                open_names.add(row.loose)
        return {name: path for name, path in taken.items() if name not in open_names}

    def _refused(
        self,
        name: str,
        path: str,
        rivals: list[str],
        taken: Mapping[str, str],
        accepted: Mapping[str, str],
    ) -> str | None:
        """Why an accepted file is not the clip of its name; None where it is."""
        if name in taken:
            if accepted[taken[name]] == accepted[path]:
                return f"duplicate of {taken[name]!r}"
            return f"its row has a file already: {taken[name]!r}"
        if len(rivals) > 1:
            other = next(rival for rival in rivals if rival != path)
            return f"another usable video has its name: {other!r}"
        lines = self._lines_of[name]
        if len(lines) > 1:
            which = ", ".join(f"{label!r} (line {line})" for label, line in lines.items())
            return f"has {len(lines)} labels in the annotations: {which}"
        return None

    def _missing(self, accepted: Mapping[str, str]) -> Iterator[Reject]:
        # What bears the row's name and looks like a video has a reason of its own.
        missing: dict[str, int] = {}
        for row in self._rows:
            files = self._files_of.get(row.exact, []) + self._files_of.get(row.loose, [])
            there = any(path in accepted or looks_like_video(path) for path in files)
            if self._wanted(row.class_name) and not there:
                missing.setdefault(row.shown, row.line)
        for shown, line in missing.items():
            yield Reject(shown, f"{MISSING} (line {line} of the annotations)")


def _folder(exact: str) -> str:
    return exact.partition("/")[0]


def _hints(annotations: Annotations) -> Callable[[str], str]:
    """What may be wrong with a video's name that no row has."""
    if annotations.in_folders:
        return lambda path: ""
    clips = {row.loose: row.shown for row in annotations.rows}

    def hint(path: str) -> str:
        if not looks_like_video(path):
            return ""
        stem = stem_of(path)
        last = len(stem) - _YOUTUBE_ID_LENGTH
        parts = [stem[i : i + _YOUTUBE_ID_LENGTH] for i in range(last + 1)]
        if clip := parts_of(stem):
            parts.insert(0, clip[0])
        known = [part for part in parts if part in clips]
        return f"; a clip of this video is called {clips[known[0]]!r} there" if known else ""

    return hint
