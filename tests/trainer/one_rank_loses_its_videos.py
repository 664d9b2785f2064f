"""train.py on several ranks, of which one alone, FAILING_RANK, soon cannot read any video.

As where a node's network file system is gone.
"""

import os

from engine.command_line import run
from engine.train import main
from engine.video.streams import FailedFileError, IndexedFiles

READABLE = 16
"""Clips, before it cannot: some more than are decoded ahead."""


def losing(self: IndexedFiles, video: int) -> None:
    global READABLE
    READABLE -= 1
    if READABLE < 0:
        raise FailedFileError(video, "cannot read it: Stale file handle")


if __name__ == "__main__":
    if os.environ["RANK"] == os.environ["FAILING_RANK"]:
        IndexedFiles.check = losing  # type: ignore[method-assign]
    run(main)
