"""Videos that fail while a stage trains: known to all ranks, and past a share the run's end."""

from pathlib import Path

from engine.errors import UserError
from engine.trainer.console import Console
from engine.trainer.logbook import Logbook
from engine.trainer.ranks import Ranks
from engine.video.loader import ClipLoader


class FailedVideos:
    """The videos of which any rank's loader could read no clip since this process began.

    Their clips were replaced, so that training goes on, until more than `max_failed` of a stage's
    videos have failed, or a loader finds nothing to read at all.
    """

    def __init__(
        self, loader: ClipLoader, ranks: Ranks, console: Console, max_failed: float
    ) -> None:
        self._loader, self._ranks, self._console = loader, ranks, console
        self._max_failed = max_failed
        self._problems: dict[str, str] = {}
        self._num_replaced = 0
        self.reason = ""
        """Why the run must end, the same on all ranks; empty while it need not."""

    def after_step(self, step: int, logbook: Logbook | None) -> None:
        """Bring all ranks to the same state, and log each video once. Collective."""
        failures, ended_by = self._loader.take_failures(), self._loader.failure
        if not self._ranks.any(failures.num_replaced > 0):
            return
        new: dict[str, str] = {}
        for told, failure in self._ranks.gather((failures, str(ended_by or ""))):
            new |= {
                path: told.problems[path] for path in told.problems if path not in self._problems
            }
            self._num_replaced += told.num_replaced
            self.reason = self.reason or failure
        if new and logbook is not None:
            logbook.failed_videos(step, new)
            if not self._problems:
                self._console.say(
                    f"note: {next(iter(new.values()))}; clips of other videos replace its clips; "
                    f"{logbook.failed_path} lists such videos"
                )
        self._problems |= new
        num_videos = len(self._loader.sampler)
        if len(self._problems) > self._max_failed * num_videos:
            example = next(iter(self._problems.values()))
            self.reason = self.reason or (
                f"{len(self._problems)} of {num_videos} videos have failed, e.g. {example} "
                f"(data.max_failed is {self._max_failed:g})"
            )

    def take_num_replaced(self) -> int:
        """How many clips were replaced, on all ranks, since this was last asked."""
        taken, self._num_replaced = self._num_replaced, 0
        return taken

    def error(self, checkpoint: Path) -> UserError:
        """The one line with which the run ends, which is saved in `checkpoint`."""
        return UserError(
            f"{self.reason}; saved {checkpoint}; once the videos are back, the same command goes on"
        )
