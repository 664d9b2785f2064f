"""Real examples (x, f(x), y) from the loader's clips, and whether training has to wait for them."""

import time
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from engine.configuration import Config
from engine.processors import cores_per_process, usable_cores
from engine.views import nearest_view

# Shares of the time that went into waiting for clips: shown on the progress line, and told with a
# remedy; and the number of steps to judge by, before which decoders only start.
_SHOWN_FROM = 0.05
_TOLD_FROM = 0.2
_STEPS = 20


class ClipBatch(Protocol):
    """A batch that a loader yields: video [B, T, 3, H, W] in [-1, 1] and labels [B]."""

    @property
    def video_BTCHW(self) -> Tensor:
        """Float32, physically channels-last."""
        ...

    @property
    def labels_B(self) -> Tensor:
        """int64; zeros without classes."""
        ...


class ClipSource(Protocol):
    """An endless source of clips with a position."""

    def __next__(self) -> ClipBatch:
        """The next batch."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position, exact to the batch."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position; raises UserError when the data set is another one."""
        ...


class RealBatch(NamedTuple):
    """A real batch; `low_BTCHW` is f(x), what the previous stage would have made of it."""

    video_BTCHW: Tensor
    low_BTCHW: Tensor | None
    labels_B: Tensor | None


class Reals:
    """Views of the loader's clips for one stage."""

    def __init__(self, loader: ClipSource, config: Config, number: int) -> None:
        self._loader = loader
        self._has_classes = config.data.num_classes is not None
        self._upsampling = config.upsampling(number) if number > 1 else None
        self.seconds_waited = 0.0
        """How long `next` has waited for clips that were not ready."""

    def next(self) -> RealBatch:
        """The next batch."""
        began = time.perf_counter()
        clips = next(self._loader)
        self.seconds_waited += time.perf_counter() - began
        low_BTCHW = None
        if self._upsampling is not None:
            low_BTCHW = nearest_view(
                clips.video_BTCHW,
                resolution=self._upsampling.resolution,
                frame_step=self._upsampling.frame_step,
            )
        return RealBatch(
            clips.video_BTCHW, low_BTCHW, clips.labels_B if self._has_classes else None
        )

    def state_dict(self) -> dict[str, Any]:
        """The loader's position."""
        return self._loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the loader's position."""
        self._loader.load_state_dict(state)


class ClipWaits:
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
