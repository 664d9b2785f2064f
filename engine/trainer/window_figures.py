"""Cheap figures of training windows, logged with the periodic samples: does a stage begin to move?

They are of windows on the batch's norm statistics and of the weights as they are, as training sees
them. Those look livelier than what a user gets: unrolled clips with fixed statistics and, where an
average is kept, averaged weights (engine/evaluation/report.py).
"""

import contextlib

import torch
from torch import Tensor

from engine.clip_figures import judder, motion, motion_ratio, variety, variety_ratio
from engine.trainer.fakes import Fake
from engine.trainer.networks import StageBuilder
from engine.trainer.reals import Reals
from engine.video.index import VideoIndex

MOTION, JUDDER, VARIETY = "window/motion_ratio", "window/judder", "window/variety"
_NUM_REAL = 64
"""Real windows compared with, at least; the first ones that rank 0 trains on."""


class WindowFigures:
    """Figures of one stage's windows beside those of real windows, which were measured once."""

    def __init__(self, real_BTCHW: Tensor, labels_B: Tensor | None, period: int) -> None:
        self._period = period
        self._motion = motion(real_BTCHW, period)
        self._variety = variety(real_BTCHW, labels_B)

    def of(self, fake: Fake) -> dict[str, float]:
        """What is logged.

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
