"""The writing of checkpoints beside the training: a step only waits for copies to be made.

The values are those of the step that asked for them. Each rank's thread writes its own files; the
ranks agree in the main thread, so that no collective runs beside training's. What fails on one rank
ends the run on all of them, at the next step.
"""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.durable_files import PARTIAL, writing
from engine.errors import UserError
from engine.trainer.checkpoint_meta import RunFacts
from engine.trainer.checkpoints import (
    begin_checkpoint,
    finish_checkpoint,
    list_files,
    lists_are_there,
    save_tensors,
)
from engine.trainer.ranks import Ranks
from engine.trainer.retention import keep_newest_and_best

Contents = Mapping[str, Callable[[], Any]]
"""What this rank writes, by file: called in the thread, so all copies must have been made."""
_DONE, _BUSY, _FAILED = range(3)
_MOST_CHARACTERS = 1000
_RESCUE_SECONDS = 120.0


class CheckpointWriter:
    """At most one checkpoint at a time; every method but `rescue` is collective."""

    def __init__(self, folder: Path, ranks: Ranks, *, keep: int) -> None:
        self._folder, self._ranks, self._keep = folder, ranks, keep
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._partial = folder
        self._told: tuple[int, RunFacts] | None = None

    @property
    def is_pending(self) -> bool:
        """Whether a checkpoint is being written; the same on all ranks."""
        return self._thread is not None

    @property
    def _final(self) -> Path:
        return self._partial.with_name(self._partial.name.removesuffix(PARTIAL))

    def start(
        self, step: int, facts: RunFacts, contents: Contents, *, least_bytes: int = 0
    ) -> None:
        """Begin to write; wait for the one before first. Raises UserError as `wait` does.

        Also where the disk has not even room for `least_bytes`, of all ranks.
        """
        self.wait()
        self._told, self._error = (step, facts), None
        try:
            self._partial = begin_checkpoint(
                self._folder, step, make=self._ranks.is_main, num_bytes=least_bytes
            )
        except UserError as error:
            self._error = error
        self._agree(_FAILED if self._error else _DONE)
        self._thread = threading.Thread(target=self._write, args=(contents,), name="checkpoint")
        self._thread.start()

    def poll(self) -> Path | None:
        """The checkpoint, if all ranks have written their files since it was asked last.

        Raises UserError, the same on all ranks, where one could not.
        """
        if self._thread is None:
            return None
        busy = self._thread.is_alive()
        state = _BUSY if busy else _FAILED if self._error else _DONE
        return self._finish() if self._agree(state) == _DONE else None

    def wait(self) -> Path | None:
        """As `poll`, when they have; None where nothing is pending."""
        if self._thread is None:
            return None
        self._thread.join()
        self._agree(_FAILED if self._error else _DONE)
        return self._finish()

    def rescue(self) -> None:
        """Where a run ends by an error: what was begun is ended, if every rank has written it.

        Not collective: other ranks may be gone.
        """
        if self._thread is None:
            return
        self._thread.join(_RESCUE_SECONDS)
        done = not self._thread.is_alive() and self._error is None
        if self._ranks.is_main and done and lists_are_there(self._partial, self._ranks.world_size):
            self._finish_alone()

    def _write(self, contents: Contents) -> None:
        try:
            for name, content in contents.items():
                with writing(self._final):
                    save_tensors(self._partial / name, content())
            list_files(self._partial, self._ranks.rank, list(contents))
        except BaseException as error:
            self._error = error

    def _finish(self) -> Path:
        self._thread = None
        if self._ranks.is_main:
            try:
                self._finish_alone()
            except UserError as error:
                self._error = error
        self._agree(_FAILED if self._error else _DONE)
        return self._final

    def _finish_alone(self) -> Path:
        assert self._told is not None
        written = finish_checkpoint(self._partial, *self._told, self._ranks.world_size)
        keep_newest_and_best(written, self._keep)
        return written

    def _agree(self, state: int) -> int:
        """The worst state of all ranks; where one has failed, its error on all of them."""
        found = self._ranks.largest(state)
        if found == _FAILED:
            self._thread = None
            text = self._ranks.first_text("" if self._error is None else str(self._error))
            if isinstance(self._error, UserError | None):
                raise UserError(text)
            raise self._error
        return found
