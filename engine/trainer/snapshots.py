"""Periodic samples during training: videos from the same inputs every time, and cheap figures.

Both show whether a stage makes progress. The figures are of training windows: with the batch's norm
statistics and the weights as they are, as training sees them. Such windows look livelier than what
a user gets, which is unrolled clips with fixed statistics and, where an average is kept, averaged
weights (engine/evaluation/report.py).
"""

import contextlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from engine.clip_figures import judder, motion, motion_ratio, variety, variety_ratio
from engine.trainer.fakes import FakeBatch, Fakes, Inputs
from engine.trainer.logbook import Logbook
from engine.trainer.networks import StageBuilder
from engine.trainer.reals import Reals
from engine.trainer.step import Trainer
from engine.video.index import VideoIndex
from engine.video.writing import contact_sheet, grid, to_uint8, write_mp4

MOTION, JUDDER, VARIETY = "window/motion_ratio", "window/judder", "window/variety"
_NUM_REAL = 64
"""Real windows compared with, at least; the first ones that rank 0 trains on."""


class WindowFigures:
    """Figures of one stage's windows beside those of real windows, which were measured once."""

    def __init__(self, real_BTCHW: Tensor, labels_B: Tensor | None, period: int) -> None:
        self._period = period
        self._motion = motion(real_BTCHW, period)
        self._variety = variety(real_BTCHW, labels_B)

    def of(self, fake: FakeBatch) -> dict[str, float]:
        """The figures that are logged.

        `window/motion_ratio` and `window/variety` are parts of the real windows'; the latter only
        where two samples are of one class. `window/judder` has this stage's frames per frame of
        x_l as its period, and is left out where that is 1.
        """
        video_BTCHW = fake.video_BTCHW
        figures = {MOTION: motion_ratio(motion(video_BTCHW, self._period), self._motion)}
        if self._period > 1:
            figures[JUDDER] = judder(video_BTCHW, self._period)
        various = variety_ratio(variety(video_BTCHW, fake.labels_B), self._variety)
        return figures if various is None else figures | {VARIETY: various}


def measure_real_windows(builder: StageBuilder, index: VideoIndex) -> WindowFigures | None:
    """The figures' reference: read anew, and the same, by every process that trains this stage.

    By a loader of its own: the training one's position must not depend on it. None where windows
    have one frame, and do not move.
    """
    config, number = builder.config, builder.number
    stage = config.stages[number]
    if stage.num_frames < 2:
        return None
    period = config.upsampling(number).frame_step if number > 1 else 1
    num_batches = -(-_NUM_REAL // stage.training.samples_per_pass)
    with contextlib.closing(builder.loader(index)) as loader:
        reals = Reals(loader, config, number)
        batches = [reals.next() for _ in range(num_batches)]
    video_BTCHW = torch.cat([batch.video_BTCHW for batch in batches])
    labels = [batch.labels_B for batch in batches if batch.labels_B is not None]
    return WindowFigures(video_BTCHW, torch.cat(labels) if labels else None, period)


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
    def generate(self, trainer: Trainer) -> FakeBatch:
        """The samples of now. Collective: ZeRO-3 gathers on all ranks.

        The norms use this batch's statistics, as in training; the 200 passes that fix them are
        for inference (engine/sample.py).
        """
        return self._fakes.run(trainer.g_engine.module, self._inputs)

    def figures(self, fake: FakeBatch) -> dict[str, float]:
        """Their `WindowFigures`, for the log."""
        figures = self._figures()
        return {} if figures is None else figures.of(fake)

    def write(self, step: int, fake: FakeBatch, logbook: Logbook) -> None:
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
