"""Writing of files that are whole or not there, even after a power failure.

A full disk, or a file that cannot be read, becomes one line for the user.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.errors import UserError

PARTIAL = ".partial"
"""What the name of a file or folder ends in until it is whole."""

# In the older format, which DeepSpeed has it write, torch.save repeats what the system said.
_OLDER_FORMAT = re.compile(r"write\(\): fd .* failed with (.+)")


@contextmanager
def writing(path: Path, *also: type[Exception]) -> Iterator[None]:
    """UserError that names `path` when what is below cannot be written: a full disk, no permission.

    For OSError, for torch.save's RuntimeError in its stead, and for `also`, a library's own errors.
    """
    expected: tuple[type[Exception], ...] = (OSError, *also)
    try:
        yield
    except expected as error:
        raise UserError(f"cannot write {path}: {_reason(error)}") from None
    except RuntimeError as error:
        reason = _hidden_reason(error)
        if reason is None:
            raise
        raise UserError(f"cannot write {path}: {reason}") from None


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """UserError that names `path` when it cannot be read: no permission, a broken disk."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {path}: {_reason(error)}") from None


def make_writable_folder(folder: Path) -> None:
    """Make it where it is missing; UserError when nothing can be written in it."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {folder}: permission denied")


def remove_folder(folder: Path) -> None:
    """Remove a folder and all in it, if it is there; UserError when it cannot be."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"cannot remove {folder}: {error.strerror or error}") from None


def remove_partials(folder: Path) -> None:
    """Remove what was never finished in `folder`; UserError when something cannot be.

    Only for whoever has the folder alone: what another process is writing looks the same.
    """
    for partial in folder.glob(f"*{PARTIAL}"):
        if partial.is_dir() and not partial.is_symlink():
            remove_folder(partial)
        else:
            with writing(partial):
                partial.unlink()


def check_space(path: Path, num_bytes: int) -> None:
    """UserError when the disk of `path`, which need not exist yet, has no room for so much."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    with writing(path):
        free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise UserError(
            f"cannot write {path}: it takes {num_bytes / 1e6:,.1f} MB, and its disk has "
            f"{free / 1e6:,.1f} MB left; free some space, and the same command goes on"
        )


def write_json(path: Path, tree: dict[str, Any]) -> None:
    """Write a file, whole or not at all, and its folder. Raises UserError when it cannot be."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + PARTIAL)
        partial.write_text(json.dumps(tree, indent=1, allow_nan=False) + "\n")
        put_in_place(partial, path)


def put_in_place(partial: Path, path: Path) -> None:
    """Rename a file when it is on the disk: after a power failure it is whole or not there."""
    put_on_disk(partial)
    partial.replace(path)
    put_on_disk(path.parent)


def put_on_disk(path: Path) -> None:
    """Wait until a file or a folder's list of files is where a power failure leaves it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _hidden_reason(error: RuntimeError) -> str | None:
    """What the system said where torch.save raises its own error for it; None for any other."""
    if isinstance(error.__context__, OSError) and "inline_container.cc" in str(error):
        return _reason(error.__context__)
    told = _OLDER_FORMAT.search(str(error))
    return told[1] if told else None
