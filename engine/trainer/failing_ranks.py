"""The end of a rank that fails: of several, the first one says why, and the others only wait."""

import os
import signal
import time
from collections.abc import Callable
from typing import NoReturn

from engine.errors import UserError
from engine.trainer.ranks import Ranks


def give_up(
    error: Exception,
    ranks: Ranks,
    *,
    tell: Callable[[Exception], object],
    note: Callable[[str], object] = lambda text: None,
) -> NoReturn:
    """End this rank, with exit code 2 for a UserError.

    The first to fail tells its error, while it is still connected; others note theirs, which
    nearly always is an echo of the first.
    """
    exit_code = 2 if isinstance(error, UserError) else 1
    first = ranks.first_failure(exit_code)
    if first is None:
        tell(error)
    else:
        note(f"another rank failed before; here: {type(error).__name__}: {error}")
        wait_for_the_end()
    # Other threads (gloo, DALI) may hang an orderly exit of a broken rank.
    os._exit(exit_code if first is None else first)


def wait_for_the_end() -> None:
    """Let the launcher end this rank when it sees the first one gone, and take that one's code."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(5)
