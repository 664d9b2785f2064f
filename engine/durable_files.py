"""Files that are whole or not there, also after a power failure."""

import os
from pathlib import Path


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
