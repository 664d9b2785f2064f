"""Periodic samples during training: the same inputs every time, so that progress can be seen."""

from pathlib import Path

import torch

from engine.trainer.fakes import Fakes, Inputs
from engine.trainer.logbook import Logbook
from engine.trainer.step import Trainer
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
        num_shown: int = 16,
    ) -> None:
        self._fakes = fakes
        self._inputs = inputs
        self._folder = folder
        self._frames_per_second = frames_per_second
        self._num_shown = num_shown

    @torch.no_grad()
    def write(self, trainer: Trainer, logbook: Logbook | None) -> None:
        """Generate and write `step-N.mp4` and `.png`. Collective: ZeRO-3 gathers on all ranks.

        The norms use this batch's statistics, as in training; the 200 passes that fix them are
        for inference (engine/sample.py).
        """
        fake = self._fakes.run(trainer.g_engine.module, self._inputs)
        if logbook is None:
            return
        videos = to_uint8(fake.video_BTCHW[: self._num_shown])
        name = self._folder / f"step-{trainer.step:08d}"
        columns = max(1, round(len(videos) ** 0.5))
        write_mp4(
            name.with_suffix(".mp4"),
            grid(videos, columns),
            self._frames_per_second,
            scale=max(1, 128 // videos.shape[-1]),
        )
        contact_sheet(videos, name.with_suffix(".png"))
        logbook.videos(trainer.step, "samples", videos, self._frames_per_second)
