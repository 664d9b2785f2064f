"""Periodic samples during training: the same inputs every time, so that progress can be seen."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from engine.trainer.fakes import Fake, Fakes, Inputs
from engine.trainer.logbook import Logbook
from engine.trainer.step import Trainer
from engine.trainer.window_figures import WindowFigures
from engine.video.writing import contact_sheet, grid, to_uint8, write_mp4


class Snapshots:
    """Samples of one stage's generator from inputs that were drawn once."""

    def __init__(
        self,
        fakes: Fakes,
        inputs: Inputs,
        *,
        folder: Path,
        frames_per_second: float,
        figures: Callable[[], WindowFigures | None] = lambda: None,
        num_shown: int = 16,
    ) -> None:
        self._fakes = fakes
        self._inputs = inputs
        self._folder = folder
        self._frames_per_second = frames_per_second
        self._figures = cache(figures)  # real windows are read when they are first compared with
        self._num_shown = num_shown

    @torch.no_grad()
    def generate(self, trainer: Trainer) -> Fake:
        """The samples of now. Collective: ZeRO-3 gathers on all ranks.

        The norms use this batch's statistics, as in training; the 200 passes that fix them are
        for inference (engine/sample.py).
        """
        return self._fakes.run(trainer.g_engine.module, self._inputs)

    def figures(self, fake: Fake) -> dict[str, float]:
        """What `window_figures.py` says of them, for the log."""
        figures = self._figures()
        return {} if figures is None else figures.of(fake)

    def write(self, step: int, fake: Fake, logbook: Logbook) -> None:
        """Write `step-N.mp4` and `.png`, and show them in TensorBoard."""
        videos = to_uint8(fake.video_BTCHW[: self._num_shown])
        name = self._folder / f"step-{step:08d}"
        columns = max(1, round(len(videos) ** 0.5))
        write_mp4(
            name.with_suffix(".mp4"),
            grid(videos, columns),
            self._frames_per_second,
            scale=max(1, 128 // videos.shape[-1]),
        )
        contact_sheet(videos, name.with_suffix(".png"))
        logbook.videos(step, "samples", videos, self._frames_per_second)
