"""A trained cascade in Python: load it, generate, pass it on.

```python
from engine import Cascade

cascade = Cascade.from_pretrained("runs/demo")  # or a folder of engine/export.py's
videos = cascade.generate(num_frames=50, classes=[3], seed=1)
```
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine.dummy_passes import (
    DummyPasses,
    TrainedCascade,
    choose_passes,
    clip_length,
    load_trained,
)
from engine.errors import UserError
from engine.exported import find_trained, fix_norms, write_exported
from engine.models.construction import forbid_tf32
from engine.sampling import SamplePlan, choose_labels, stream
from engine.transfers import device_named


class Cascade:
    """Generates videos of any length, each from a seed of its own.

    Shapes: N videos, T frames, 3 x H x W pixels, uint8 (RGB).
    """

    def __init__(self, trained: TrainedCascade, device: torch.device | str = "auto") -> None:
        self._trained = trained
        forbid_tf32()
        self._cascade = load_trained(trained, device_named(device))
        self._fixed: DummyPasses | None = None

    @classmethod
    def from_pretrained(cls, path: str | Path, device: torch.device | str = "auto") -> "Cascade":
        """Read an exported folder, or the newest checkpoint of a run's, stage's or its own folder.

        Nothing that is read is executed. Raises UserError where there is neither, or a damaged one.
        """
        return cls(find_trained(Path(path)), device)

    @property
    def resolution(self) -> int:
        """Height and width in pixels."""
        return self._trained.config().stages[self._trained.stage_number].resolution

    @property
    def classes(self) -> list[str]:
        """Names by number; empty where the data set named none."""
        return self._trained.classes

    @property
    def frames_per_second(self) -> float:
        """Of the videos."""
        return self._trained.frames_per_second

    @property
    def trained_frames(self) -> int:
        """The length that training's clips unroll to, `generate`'s default."""
        return clip_length(self._trained)

    def generate(
        self,
        num_frames: int | None = None,
        *,
        classes: Sequence[int | str] | None = None,
        num: int | None = None,
        seed: int = 0,
        sigma: float | None = None,
    ) -> Tensor:
        """Videos [N, T, 3, H, W].

        `num` of them, of `classes` in turn: numbers or names, by default one of each that was
        trained on, at most 16. `sigma` is the standard deviation of z: 1 for metrics, 0.5 for
        pictures (paper); by default that of the exported statistics, or 1. Another one than the
        statistics' runs the dummy passes anew, as a checkpoint does at its first call.
        Raises UserError for classes that there are not and for numbers that nothing is made with.
        """
        videos = self.stream(num_frames, classes=classes, num=num, seed=seed, sigma=sigma)
        return torch.stack([torch.cat(list(chunks)) for chunks in videos])

    def stream(
        self,
        num_frames: int | None = None,
        *,
        classes: Sequence[int | str] | None = None,
        num: int | None = None,
        seed: int = 0,
        sigma: float | None = None,
    ) -> Iterator[Iterator[Tensor]]:
        """As `generate`, video by video and each in chunks [t, 3, H, W] on the CPU.

        Memory does not grow with the length: a chunk can go straight into an encoder, as
        `engine.video.writing.mp4_file` takes it. Chunks are made as they are read. Read them before
        the next call, which may fix statistics of another length or sigma.
        """
        labels = self._labels(classes, num)
        if num_frames is not None and num_frames < 1:
            raise UserError(f"num_frames must be at least 1, not {num_frames}")
        frames = num_frames or self.trained_frames
        passes = self._passes(frames, sigma, seed)
        self._fix(passes)
        plan = SamplePlan(self._trained, labels, frames, passes.sigma, seed, passes)
        return stream(self._cascade, plan)

    def save_pretrained(self, path: str | Path) -> None:
        """Write config.json, model.safetensors and a model card into a folder.

        With the statistics of the last call, or those of training's length and sigma 1. Raises
        UserError where it cannot be written.
        """
        passes = self._fixed or self._passes(self.trained_frames, None, 0)
        self._fix(passes)
        write_exported(Path(path), self._cascade, self._trained, passes)

    def _labels(self, classes: Sequence[int | str] | None, num: int | None) -> list[int | None]:
        if num is not None and num < 1:
            raise UserError(f"num must be at least 1, not {num}")
        if classes is None:
            return choose_labels(None, num, self._trained)
        if not classes:
            raise UserError("classes must name at least one")
        labels: list[int | None] = []
        for name in classes:
            labels += choose_labels(str(name), 1, self._trained)
        return [labels[i % len(labels)] for i in range(num or len(labels))]

    def _passes(self, num_frames: int, sigma: float | None, seed: int) -> DummyPasses:
        if sigma is None:
            own = self._trained.passes
            sigma = 1.0 if own is None else own.sigma
        if not 0 < sigma < math.inf:
            raise UserError(f"sigma must be positive and finite, not {sigma}")
        return choose_passes(self._trained, num_frames=num_frames, sigma=sigma, seed=seed)

    def _fix(self, passes: DummyPasses) -> None:
        if passes != self._fixed:
            fix_norms(self._cascade, self._trained, passes)
            self._fixed = passes
