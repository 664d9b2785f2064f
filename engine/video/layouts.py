"""Videos whose folders name their classes, and folders that are one level too high for that.

A layout says which files are to be judged, and which class each accepted one is of.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from engine.errors import UserError
from engine.video.class_list import ClassList
from engine.video.index import Reject, as_text
from engine.video.reasons import BESIDE, OUTSIDE, looks_like_video

_SPLITS = {
    **dict.fromkeys(("train", "training", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# train_256, val-2, kinetics400_train, test2017: also what a class could be called.
_LIKE_SPLIT = re.compile(rf"(?:.*[_-])?({'|'.join(_SPLITS)})(?:\d+|[_-].*)?")
# The folder that Kinetics-400's mirror ships beside its splits.
_REPLACEMENTS = "replacement"


class ClassFolders:
    """A folder of class folders (Kinetics, UCF101), or a flat folder without classes (BDD100K).

    A folder without a video is no class, whatever else lies in it. Raises UserError for a folder
    that is one level too high, a class whose name is not UTF-8, and a class list for a flat folder.
    """

    def __init__(self, root: Path, files: list[str], listed: ClassList | None) -> None:
        self._listed = listed
        self.to_judge: list[str] = []
        """Files to decode, sorted."""
        self.rejects: list[Reject] = []
        """Files that no class has, without decoding them."""
        check_level(root, files, listed)
        videos = [path for path in files if looks_like_video(path)]
        # Names need not promise a video: without any that do, every file may be one.
        self._flat = not any("/" in path for path in videos or files)
        if self._flat and listed is not None:
            raise UserError(
                f"{root} has no class folders for the classes of {listed.file}: leave --classes "
                "out, or name the videos' classes with --annotations"
            )
        self._folders = {path.partition("/")[0] for path in videos if "/" in path}
        for name in sorted(self._folders):
            if as_text(name) != name and listed is None:
                raise UserError(f"{root / as_text(name)}: the class's name is not UTF-8; rename it")
        for path in files:
            reason = self._left_out(path)
            if reason is None:
                self.to_judge.append(path)
            else:
                self.rejects.append(Reject(path, reason))

    def assign(self, accepted: Mapping[str, str]) -> tuple[dict[str, str | None], list[Reject]]:
        """The class of each accepted file (path -> SHA-256), in path order; nothing is refused."""
        names = (None if self._flat else path.partition("/")[0] for path in self.to_judge)
        of_all = zip(self.to_judge, names, strict=True)
        return {path: name for path, name in of_all if path in accepted}, []

    def class_names(self, accepted: Mapping[str, str]) -> tuple[str, ...]:
        """All classes, also those whose videos are all damaged, or their labels would shift."""
        if self._flat:
            return ()
        if self._listed is not None:
            return self._listed.names
        return tuple(sorted(self._folders | {path.partition("/")[0] for path in accepted}))

    def _left_out(self, path: str) -> str | None:
        folder, slash, _ = path.partition("/")
        if self._flat:
            return BESIDE if slash else None
        if not slash:
            return OUTSIDE
        if self._listed is not None and folder not in self._listed:
            return self._listed.leaves_out(as_text(folder))
        return None


def check_level(root: Path, files: list[str], listed: ClassList | None = None) -> None:
    """UserError where the first folders below `root` are splits or a whole data set, not classes.

    It names the folder to give instead. Any folder named in `listed` is a class.
    """
    videos = [path for path in files if looks_like_video(path)]
    problem = _wrong_level(videos)
    if problem is None:
        return
    if listed is not None and {path.partition("/")[0] for path in videos} & set(listed.names):
        return
    what, listed_as, inner = problem
    right = Path(inner)
    while deeper := _wrong_level(_below(videos, right)):
        right /= deeper[-1]
    raise UserError(
        f"{as_text(str(root))} {what}: give {as_text(str(root / right))}, or, where {listed_as} in "
        "engine/prepare.py --classes FILE"
    )


def _wrong_level(videos: list[str]) -> tuple[str, str, str] | None:
    """What the first folders are, how to say that they are classes, and in which to go on."""
    folders = sorted({path.partition("/")[0] for path in videos if "/" in path})
    named = [name for name in folders if not name.lower().startswith(_REPLACEMENTS)]
    exact = {name: _SPLITS[name.lower()] for name in named if name.lower() in _SPLITS}
    alike = {name: _SPLITS[m[1]] for name in named if (m := _LIKE_SPLIT.fullmatch(name.lower()))}
    # A split's name alone among other folders may be a class: a train is a vehicle too.
    if named and (len(set(exact.values())) > 1 or len(alike) == len(named)):
        splits = sorted(exact if len(set(exact.values())) > 1 else alike)
        first = min(splits, key=lambda name: alike[name] != "train")
        what = f"holds splits ({_listing(splits)}), not classes"
        return what, "these are classes, list them", first
    if len(folders) == 1 and all("/" in path for path in _below(videos, Path(folders[0]))):
        (name,) = folders
        inner = sorted({path.partition("/")[0] for path in _below(videos, Path(name))})
        what = f"has one folder, {as_text(name)}, which holds only folders ({_listing(inner)})"
        return what, f"{as_text(name)} is a class, list it", name
    return None


def _below(videos: list[str], folder: Path) -> list[str]:
    prefix = f"{folder.as_posix()}/"
    return [path.removeprefix(prefix) for path in videos if path.startswith(prefix)]


def _listing(names: list[str]) -> str:
    return ", ".join(as_text(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")
