"""Real examples: (x, f(x), y) from the loader's clips."""

import time
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from engine.configuration import Config
from engine.views import nearest_view


class Clips(Protocol):
    """What a loader yields: video [B, T, 3, H, W] in [-1, 1] and labels [B]."""

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

    def __next__(self) -> Clips:
        """The next batch."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position, exact to the batch."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position; raises UserError when the data set is another one."""
        ...


class Real(NamedTuple):
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

    def next(self) -> Real:
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
        return Real(clips.video_BTCHW, low_BTCHW, clips.labels_B if self._has_classes else None)

    def state_dict(self) -> dict[str, Any]:
        """The loader's position."""
        return self._loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the loader's position."""
        self._loader.load_state_dict(state)
