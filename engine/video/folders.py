"""Which files lie below a folder, and which only seem to: symbolic links that lead out of it.

A folder from elsewhere must not make this project read files that its user did not name.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from engine.errors import UserError

LINK_OUT = "a symbolic link out of the folder"
"""Why a file or a folder is not read."""
NOT_INDEXED = f"{LINK_OUT}; engine/prepare.py --follow-symlinks takes it"


class Found(NamedTuple):
    """Something below a folder."""

    path: str
    """Relative to the folder, with forward slashes; a folder's ends in one."""
    leads_out: bool
    """It is such a link, and links are not followed: of a folder, nothing in it is found."""


def files_of(root: Path, *, follow_symlinks: bool) -> Iterator[Found]:
    """The files below `root` that are not hidden, nor in hidden folders, each once.

    The root itself may be a link. Raises UserError for a folder that cannot be read.
    """
    real_root, seen = os.path.realpath(root), set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_unreadable):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a folder above would lead round for ever
            subfolders.clear()
            continue
        seen.add(real)
        inside = []
        for name in sorted(subfolders):
            path = Path(folder, name)
            if name.startswith("."):
                continue
            if not follow_symlinks and leads_out(path, real_root):
                yield Found(f"{path.relative_to(root).as_posix()}/", True)
            else:
                inside.append(name)
        subfolders[:] = inside
        for name in names:
            path = Path(folder, name)
            if not name.startswith("."):
                refused = not follow_symlinks and path.is_symlink() and leads_out(path, real_root)
                yield Found(path.relative_to(root).as_posix(), refused)


def leads_out(path: Path, real_root: str) -> bool:
    """Whether what is below `real_root`, a path without links, is really elsewhere."""
    return os.path.commonpath([os.path.realpath(path), real_root]) != real_root


def _unreadable(error: OSError) -> NoReturn:
    raise UserError(f"cannot read {error.filename}: {error.strerror}")
