"""A bank of the frozen stages' samples: later stages take windows of videos drawn ahead.

Frozen stages generate the same distribution all along, so a video may serve many windows. Without
a bank every update makes them generate anew: for stage 2 of Kinetics three times 2.5 TFLOP per
sample and iteration, beside 9.6 for the rest of the step.

Decided, where the paper has no bank:

- The bank holds the videos from which windows are cut: the last frozen stage's, at its training
  length. For stage 2 that is stage 1's whole clip, for stage 3 stage 2's window of one; only the
  last window is chosen anew at each use, with the distribution of `GeneratorCascade.sample_window`.
- The videos are uint8, so x_l has the 256 levels of real clips, at most 1/255 off the samples.
- They are in main memory: a batch of windows is a megabyte to copy, and GPU memory limits the
  micro-batch.
- Videos are drawn in batches, each from a seed of its own, into a ring: the oldest is replaced,
  evenly over `refresh_every` iterations. What the bank holds is a function of the step alone, so
  checkpoints do not store it and a resumed run draws it again.
- A window's video is drawn uniformly, with replacement.
"""

import math
import os
from collections.abc import Callable

import torch
from torch import Tensor

from engine.configuration import SampleBank, Training
from engine.errors import UserError
from engine.models.cascade import GeneratorCascade
from engine.trainer.fakes import LatentSource
from engine.transfers import to_device
from engine.video.writing import to_uint8


def batches_per_rank(bank: SampleBank, training: Training, world_size: int) -> int:
    """Batches of `micro_batch` videos that each rank keeps.

    Raises UserError when the videos are not a whole number of them, naming the nearest that are.
    """
    videos_per_batch = world_size * training.samples_per_pass
    batches, remainder = divmod(bank.num_videos, videos_per_batch)
    if remainder:
        nearest = [str(n * videos_per_batch) for n in (batches, batches + 1) if n]
        processes = "1 process" if world_size == 1 else f"{world_size} processes"
        raise UserError(
            f"training.sample_bank.num_videos {bank.num_videos} must be a multiple of "
            f"{videos_per_batch} ({processes} x micro_batch {training.samples_per_pass}); nearest: "
            f"{' or '.join(nearest)}"
        )
    return batches


class BankedWindows:
    """Windows of stage `number`'s inputs from this rank's share of the bank; see `WindowSource`.

    `latents_of(n)` gives the latents of the n-th batch of videos drawn, counted from the run's
    start; `random` chooses videos and windows. The bank is empty until `advance`.
    """

    def __init__(
        self,
        cascade: GeneratorCascade,
        number: int,
        *,
        latents_of: Callable[[int], LatentSource],
        random: torch.Generator,
        batch_size: int,
        num_batches: int,
        refresh_every: int,
    ) -> None:
        self.num_batches = num_batches
        self.num_videos = num_batches * batch_size
        self._cascade, self._number = cascade, number
        self._latents_of, self._random = latents_of, random
        self._batch_size, self._refresh_every = batch_size, refresh_every
        stage = cascade.config.stages[number - 1]
        # Channels last, as the loader's clips are.
        shape = self.num_videos, stage.num_frames, stage.resolution, stage.resolution, 3
        # Asked first: Linux promises any amount, and kills the process that then writes to it.
        if math.prod(shape) > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
            raise UserError(
                f"training.sample_bank: {math.prod(shape) / 1e9:.0f} GB for this rank's videos do "
                "not fit into main memory; lower num_videos"
            )
        self._videos_NTHWC = torch.empty(shape, dtype=torch.uint8)
        has_classes = cascade.config.data.num_classes is not None
        self._labels_N = torch.empty(self.num_videos, dtype=torch.int64) if has_classes else None
        self._device = next(cascade.parameters()).device
        self._held = range(0)
        """Batches drawn and kept; batch n is in the n-th place of the ring, modulo its size."""

    @property
    def num_bytes(self) -> int:
        """Bytes of this rank's videos."""
        return self._videos_NTHWC.nbytes

    def advance(self, step: int, goes_on: Callable[[int], bool] = lambda count: True) -> bool:
        """Hold what iteration `step` (counted from 0) draws from.

        All of them at the start and after a resume, later those whose turn it is. `goes_on(n)` is
        asked after the n-th batch drawn; a no ends it with False, and the bank serves no more until
        it is advanced again.
        """
        num_replaced = step * self.num_batches // self._refresh_every
        to_hold = range(num_replaced, num_replaced + self.num_batches)
        if to_hold == self._held:
            return True
        missing = [batch for batch in to_hold if batch not in self._held]
        self._held = range(0)  # until all are drawn: what they replace is gone
        for count, batch in enumerate(missing, start=1):
            self._draw(batch)
            if not goes_on(count):
                return False
        self._held = to_hold
        return True

    def __call__(self, batch_size: int) -> tuple[Tensor | None, Tensor]:
        """Labels [B] and x_l [B, T_low, 3, h, h]."""
        assert self._held, "advance comes first"
        chosen_B = torch.randint(self.num_videos, (batch_size,), generator=self._random)
        low_BTHWC = self._cascade.draw_windows(
            self._number, self._videos_NTHWC[chosen_B], self._random
        )
        labels_B = (
            None if self._labels_N is None else to_device(self._labels_N[chosen_B], self._device)
        )
        low_BTCHW = to_device(low_BTHWC, self._device).permute(0, 1, 4, 2, 3)
        return labels_B, low_BTCHW.float().div_(127.5).sub_(1)  # as the loader's clips

    @torch.no_grad()
    def _draw(self, batch: int) -> None:
        latents = self._latents_of(batch)
        zs = latents.latents(self._batch_size, self._number - 1)
        labels_B = latents.labels(self._batch_size)
        video_BTCHW = self._cascade.sample_previous(self._number, zs, labels_B, latents.random)
        if not video_BTCHW.isfinite().all():  # uint8 would hide it
            raise UserError(
                f"the frozen stage {self._number - 1} generates values that are not finite; "
                "choose an earlier checkpoint of it with --previous"
            )
        start = batch % self.num_batches * self._batch_size
        places = slice(start, start + self._batch_size)
        self._videos_NTHWC[places] = to_uint8(video_BTCHW).permute(0, 1, 3, 4, 2).cpu()
        if self._labels_N is not None and labels_B is not None:
            self._labels_N[places] = labels_B.cpu()
