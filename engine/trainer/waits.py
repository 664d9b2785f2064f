"""Whether training waits for clips: told while it runs, and once with what to do about it."""

from engine.processors import cores_per_process, usable_cores

_SHOWN_FROM = 0.05
_TOLD_FROM = 0.2
_STEPS = 20  # to judge by; before that decoders only start


class Waits:
    """Shares of the time of this rank's last steps that went into waiting for real clips."""

    def __init__(self, num_threads: int | None) -> None:
        self._num_threads = num_threads
        self._last: list[tuple[float, float]] = []
        self._told = False

    def add(self, waited: float, taken: float) -> None:
        """Seconds of one step."""
        self._last = [*self._last, (waited, taken)][-_STEPS:]

    @property
    def share(self) -> float:
        """0 to 1, over the last steps."""
        taken = sum(seconds for _, seconds in self._last)
        return sum(waited for waited, _ in self._last) / taken if taken else 0.0

    @property
    def shown(self) -> str:
        """For the progress line; empty where there is little to tell."""
        return f"waits for clips {self.share:.0%}" if self.share >= _SHOWN_FROM else ""

    def remedy(self) -> str | None:
        """A line for the user, once, where clips come too slowly."""
        if self._told or len(self._last) < _STEPS or self.share < _TOLD_FROM:
            return None
        self._told = True
        threads, cores = self._num_threads or cores_per_process(), usable_cores()
        named = f"{threads} decoding thread{'s' if threads > 1 else ''} per process"
        return (
            f"note: {self.share:.0%} of the time is spent waiting for clips, with {named} on "
            f"{cores} cores; raise data.num_threads where cores are idle, or make small copies of "
            "the videos with engine/prepare.py --transcode"
        )
