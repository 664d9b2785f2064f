"""The windows of a step that a profile looks at, and the micro-batches that each stands for.

An update may accumulate hundreds of micro-batches. The first one's gradients are added to nothing,
the last one ends in the optimizer's step, and all others do the same. So three of D's and three of
G's are looked at, in three windows, and whatever else there is of the step around them:

    | begins … D's first, D's second |   | D's last … G's first, G's second |   | G's last … ends |

The second follows the first without a pause, as on a GPU the host is ahead of the device by then.
An update of three micro-batches or fewer has no two alike: the whole step is one window.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch

from engine.trainer.profiling.places import D_UPDATE, G_UPDATE, Range, inside, named_parts
from engine.trainer.step import Trainer

NUM_KINDS = 3


class WindowRecorder(Protocol):
    """Looks at a step's windows, one after the other."""

    def prepare(self) -> None:
        """A window begins soon: a micro-batch later, or with the next step."""

    def begin(self) -> None:
        """A window begins; the ranges that are open are entered next."""

    def enter(self, entered: Range) -> None:
        """What runs from now on belongs to this range."""

    def leave(self) -> None:
        """Back to the range around it."""

    def end(self) -> None:
        """The window ends; all its ranges have been left."""


class Windows:
    """Shows a trainer's steps to a recorder, window by window."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._num_d_updates = trainer._training.discriminator_steps
        self._num_accumulated = trainer._accumulation_steps
        self._device = trainer.g_engine.device
        self._is_open = False
        self._open_ranges: list[Range] = []
        self._num_d_updates_done = 0
        self._position = 0  # of a micro-batch in its update

    @property
    def are_apart(self) -> bool:
        """Not all of a step is looked at."""
        return self._num_accumulated > NUM_KINDS

    @property
    def number(self) -> int:
        """Windows of a step."""
        return 3 if self.are_apart else 1

    @property
    def num_looked_at(self) -> int:
        """Micro-batches of a step."""
        return 2 * NUM_KINDS if self.are_apart else self._trainer.num_micro_batches

    @property
    def weights(self) -> dict[str, int]:
        """`Place.update` → how many in a step one that is looked at stands for, where not 1."""
        if not self.are_apart:
            return {}
        last = self._num_accumulated - 1
        weights = {
            self._micro_batch(update, position): num_updates * (last - 1 if position == 1 else 1)
            for update, num_updates in ((D_UPDATE, self._num_d_updates), (G_UPDATE, 1))
            for position in (0, 1, last)
        }
        weights[_outside(D_UPDATE)] = self._num_d_updates
        return {update: weight for update, weight in weights.items() if weight > 1}

    def show(
        self, recorder: WindowRecorder, goes_on: Callable[[], bool] = lambda: True
    ) -> dict[str, float]:
        """`Trainer.train_step`, with all that it returns and raises."""
        self._recorder, self._num_d_updates_done = recorder, 0
        with contextlib.ExitStack() as undo:
            undo.enter_context(named_parts(self._trainer, self._enter, self._leave))
            if self.are_apart:
                for name, update in (("_d_micro_batch", D_UPDATE), ("_g_micro_batch", G_UPDATE)):
                    before = partial(self._before_micro_batch, update)
                    undo.enter_context(inside(self._trainer, name, before, self._after_micro_batch))
            self._begin()
            undo.callback(self._end)
            return self._trainer.train_step(goes_on)

    def _before_micro_batch(self, update: str) -> None:
        num_left = self._num_accumulated - self._position
        if update == G_UPDATE or self._num_d_updates_done == self._num_d_updates - 1:
            if num_left == 2:
                self._recorder.prepare()
            elif num_left == 1:
                self._begin()
        self._enter(Range(update=self._micro_batch(update, self._position)))

    def _after_micro_batch(self) -> None:
        self._leave()
        if self._position == 1:
            self._end()
        self._position += 1

    def _begin(self) -> None:
        # Of what was launched before nothing is known, so the device must have done it.
        self._wait()
        self._recorder.begin()
        self._is_open = True
        for entered in self._open_ranges:
            self._recorder.enter(entered)

    def _end(self) -> None:
        if not self._is_open:
            return
        self._wait()
        for _ in self._open_ranges:
            self._recorder.leave()
        self._is_open = False
        self._recorder.end()

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _enter(self, entered: Range) -> None:
        if entered.update in (D_UPDATE, G_UPDATE):
            self._position = 0
            if self.are_apart:
                entered = Range(update=_outside(entered.update))
        self._open_ranges.append(entered)
        if self._is_open:
            self._recorder.enter(entered)

    def _leave(self) -> None:
        left = self._open_ranges.pop()
        self._num_d_updates_done += left.update == _outside(D_UPDATE)
        if self._is_open:
            self._recorder.leave()

    def _micro_batch(self, update: str, position: int) -> str:
        """Its `Place.update`."""
        total = self._num_accumulated
        alike = f"es 2 to {total - 1}" if 0 < position < total - 1 else f" {position + 1}"
        return f"{update}, micro-batch{alike} of {total}"


def _outside(update: str) -> str:
    return f"{update}, outside micro-batches"
