"""The lock of a stage's folder: one run at a time writes there.

All ranks hold it, until they end in whatever way: the system gives it back when a process is gone,
so none is left behind. A process that a rank has forked holds it as well.
"""

import errno
import fcntl
import json
import os
import socket
from datetime import datetime
from pathlib import Path
from typing import IO

from engine.durable_files import writing
from engine.errors import UserError

LOCK = "lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class FolderLock:
    """Rank 0 takes it for the job; the others join in."""

    def __init__(self, folder: Path, *, is_main: bool) -> None:
        """Take it. Raises UserError that names the holder where another run has it.

        Of a job of several ranks, the others may come only after rank 0, which then calls
        `admit_others`.
        """
        self._folder = folder
        self.works = True
        """Whether the file system has locks at all."""
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / LOCK).open("a+", encoding="utf-8")
        self._take(fcntl.LOCK_EX if is_main else fcntl.LOCK_SH)
        if is_main:
            with writing(folder / LOCK):
                self._file.truncate(0)
                self._file.write(json.dumps(_this_process()) + "\n")
                self._file.flush()

    def admit_others(self) -> None:
        """Share it with this job's other ranks; another run needs it alone."""
        self._take(fcntl.LOCK_SH)

    def release(self) -> None:
        """Give it back; the file stays, for whoever looks at who was here last."""
        self._file.close()

    def _take(self, kind: int) -> None:
        try:
            fcntl.flock(self._file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(self._file)
            self._file.close()
            raise UserError(
                f"{self._folder} is in use by {holder}: wait for that run to end, or use another "
                "--out"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            self.works = False


def _this_process() -> dict[str, str | int]:
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": now}


def _holder(file: IO[str]) -> str:
    """What stands in the file, which is rank 0's word."""
    try:
        file.seek(0)
        told = json.loads(file.read())
        return f"process {told['pid']} on {told['host']} since {told['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another run"
