"""The training step of one stage: two discriminator updates, then one generator update.

Read `Trainer.train_step`, `d_step` and `g_step`: they are the algorithm. Everything they change
is in `Trainer.state_dict` or in the two engines' own checkpoints.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from engine.configuration import Stage
from engine.models.discriminators import Scores, draw_frame_indices
from engine.trainer.averaging import WeightAverage
from engine.trainer.deepspeed_engines import EngineUpdate, frozen, renew_spectral_norm
from engine.trainer.fakes import FakeBatch, Fakes, Inputs
from engine.trainer.losses import discriminator_hinge, generator_hinge
from engine.trainer.reals import RealBatch, Reals
from engine.trainer.sample_bank import BankedWindows
from engine.transfers import to_device


class Means:
    """Means over the micro-batches of one update, without a device synchronisation each."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Add one scalar."""
        value = value.detach()
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] = self._counts.get(name, 0) + 1

    def all(self) -> dict[str, Tensor]:
        """Name → mean."""
        return {name: total / self._counts[name] for name, total in self._sums.items()}


def mean_over_ranks(measures: dict[str, Tensor], device: torch.device) -> dict[str, float]:
    """One all-reduce for all of them; a NaN on one rank is a NaN on every rank."""
    values = torch.stack([value.to(device, torch.float32) for value in measures.values()])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return dict(zip(measures, values.tolist(), strict=True))


class NonFiniteError(RuntimeError):
    """A loss, gradient or weight is no longer a number; names stage, step and tensor."""


class StepStoppedError(Exception):
    """An iteration ended before its end, because it was asked to; the trainer can be saved."""


def _always() -> bool:
    return True


class Trainer:
    """Alternates the two engines of one stage."""

    def __init__(
        self,
        *,
        stage_number: int,
        stage: Stage,
        g_engine: deepspeed.DeepSpeedEngine,
        d_engine: deepspeed.DeepSpeedEngine,
        fakes: Fakes,
        reals: Reals,
        random: torch.Generator,
        accumulation_steps: int,
        average: WeightAverage | None,
        bank: BankedWindows | None = None,
    ) -> None:
        self.stage_number = stage_number
        self.g_engine = g_engine
        self.d_engine = d_engine
        self.average = average
        self.bank = bank
        self.step = 0
        self._training = stage.training
        self._spatial_frames = stage.discriminators.spatial_frames
        self._fakes = fakes
        self._reals = reals
        self._random = random
        self._accumulation_steps = accumulation_steps
        self._kept_fake: FakeBatch | None = (
            None  # between the last D update and G's, if reuse_fakes
        )
        # Of the iteration at hand: the measures of its D updates that are done, and where random
        # numbers and clips stood when the update at hand began, if it was stopped.
        self._d_updates: list[dict[str, Tensor]] = []
        self._stopped_at: dict[str, Any] | None = None
        zero_stage = stage.training.zero_stage
        self._g_update = EngineUpdate(g_engine, zero_stage)
        self._d_update = EngineUpdate(d_engine, zero_stage)

    @property
    def progress(self) -> tuple[int, int]:
        """Whole iterations, and D updates of the one at hand that are done."""
        return self.step, len(self._d_updates)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of an iteration."""
        return self._accumulation_steps * (self._training.discriminator_steps + 1)

    @property
    def seconds_waited(self) -> float:
        """How long this rank has waited for real clips."""
        return self._reals.seconds_waited

    def train_step(self, goes_on: Callable[[], bool] = _always) -> dict[str, float]:
        """One iteration (paper): `discriminator_steps` D updates and one G update.

        Returns measures averaged over the D updates, the micro-batches and all ranks.
        `goes_on` is asked before every micro-batch but where G judges what D was just shown; its
        answers must be the same on all ranks.

        Raises StepStoppedError after a no. What is saved then is the beginning of the update at
        hand: a resumed run does that update again. This trainer trains no more, since a part of
        the gradients stays in the engines.
        Raises NonFiniteError, on every rank, when a measure is not a number.
        """
        if self.bank is not None:
            self.bank.advance(self.step)
        # All of them are kept, not the last one's: ZeRO skips an update whose gradient is not
        # finite, and nothing else would tell.
        while len(self._d_updates) < self._training.discriminator_steps:
            is_last = len(self._d_updates) == self._training.discriminator_steps - 1
            keep_fakes = is_last and self._training.reuse_fakes
            self._d_updates.append(
                self._update(partial(self.d_step, goes_on, keep_fakes=keep_fakes))
            )
        measures = {
            name: torch.stack([update[name] for update in self._d_updates]).mean()
            for name in self._d_updates[0]
        }
        measures |= self._update(partial(self.g_step, goes_on))
        self._d_updates = []
        if self.average is not None:
            self.average.update(self.g_engine.module)
        self.step += 1
        means = mean_over_ranks(measures, self.g_engine.device)
        self._check_finite(means)
        return means

    def d_step(
        self, goes_on: Callable[[], bool] = _always, *, keep_fakes: bool = False
    ) -> dict[str, Tensor]:
        """One discriminator update over the global batch; `goes_on` as `train_step` has it.

        `keep_fakes` keeps them with their graph, for the `g_step` that comes next; there is room
        for one micro-batch's.
        """
        measures = Means()
        for _ in range(self._accumulation_steps):
            self._ask(goes_on)
            grad_norm = self._d_micro_batch(measures, keep_fakes=keep_fakes)
        renew_spectral_norm(self.d_engine.module, zero_stage=self._training.zero_stage)
        return measures.all() | {"grad_norm_D": grad_norm}

    def _d_micro_batch(self, measures: Means, *, keep_fakes: bool) -> Tensor:
        """Adds to `measures`; the gradient's norm, as `EngineUpdate.step` has it."""
        real = self._reals.next()
        if keep_fakes:
            self._kept_fake = self._generated()
            fake = _detached(self._kept_fake)
        else:
            with torch.no_grad():
                fake = self._fakes.run(self.g_engine.module, self._draw())
        # One pass over both halves: D has no batch norm, so it is exact, and launches once.
        scores = self.d_engine(*self._judged(_joined(real, fake)), num_batches=2)
        real_scores, fake_scores = _halves(scores)
        loss = discriminator_hinge(real_scores.all, fake_scores.all)
        self.d_engine.backward(loss)
        grad_norm = self._d_update.step()
        measures.add("loss_D", loss)
        measures.add("accuracy_D_real", (real_scores.all > 0).float().mean())
        measures.add("accuracy_D_fake", (fake_scores.all < 0).float().mean())
        for name, real_BN in real_scores.by_name().items():
            measures.add(f"score_real/{name}", real_BN.mean())
        for name, fake_BN in fake_scores.by_name().items():
            measures.add(f"score_fake/{name}", fake_BN.mean())
        return grad_norm

    def g_step(self, goes_on: Callable[[], bool] = _always) -> dict[str, Tensor]:
        """One generator update over the global batch; `goes_on` as `train_step` has it."""
        measures = Means()
        with frozen(self.d_engine.module):
            for _ in range(self._accumulation_steps):
                self._ask(goes_on)
                grad_norm = self._g_micro_batch(measures)
        renew_spectral_norm(self.g_engine.module, zero_stage=self._training.zero_stage)
        return measures.all() | {"grad_norm_G": grad_norm}

    def _g_micro_batch(self, measures: Means) -> Tensor:
        """One micro-batch of G's update, with D frozen; as `_d_micro_batch`."""
        fake = self._generated() if self._kept_fake is None else self._kept_fake
        self._kept_fake = None
        scores = self.d_engine.module(*self._judged(fake))
        loss = generator_hinge(scores.all)
        self.g_engine.backward(loss)
        grad_norm = self._g_update.step()
        measures.add("loss_G", loss)
        return grad_norm

    def state_dict(self) -> dict[str, Any]:
        """The state that the step changes on this rank, besides the two engines'."""
        done = [{name: value.item() for name, value in d.items()} for d in self._d_updates]
        return {"step": self.step, "d_updates": done, **(self._stopped_at or self._position())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        self.step = state["step"]
        device = self.g_engine.device
        self._d_updates = [
            {name: torch.tensor(value, device=device) for name, value in done.items()}
            for done in state.get("d_updates", [])  # earlier versions stopped between iterations
        ]
        self._random.set_state(state["random"])
        self._reals.load_state_dict(state["reals"])

    def reseed(self, seed: int) -> None:
        """Draw other random numbers from now on."""
        self._random.manual_seed(seed)

    def _position(self) -> dict[str, Any]:
        """The position in what the step draws from: random numbers and clips."""
        return {"random": self._random.get_state(), "reals": self._reals.state_dict()}

    def _update(self, run: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Run an update. One that is stopped counts as not begun."""
        began_at = self._position()
        try:
            return run()
        except StepStoppedError:
            self._stopped_at = began_at
            raise

    def _ask(self, goes_on: Callable[[], bool]) -> None:
        """Before a micro-batch. Where G judges what D was shown, nothing comes between them."""
        if self._kept_fake is None and not goes_on():
            raise StepStoppedError

    def _generated(self) -> FakeBatch:
        """A batch of fakes with gradients to G's weights."""
        return self._fakes.run(self.g_engine, self._draw())

    def _draw(self) -> Inputs:
        return self._fakes.draw(self._training.samples_per_pass)

    def _judged(self, batch: FakeBatch | RealBatch) -> tuple[Tensor | None, ...]:
        """The discriminators' arguments: the batch, and the frames the spatial one looks at."""
        batch_size, num_frames = batch.video_BTCHW.shape[:2]
        drawn_BK = draw_frame_indices(batch_size, num_frames, self._spatial_frames, self._random)
        frames_BK = to_device(drawn_BK, batch.video_BTCHW.device)
        return batch.video_BTCHW, batch.labels_B, batch.low_BTCHW, frames_BK

    def _check_finite(self, means: dict[str, float]) -> None:
        bad = {"measures": [name for name, value in means.items() if not math.isfinite(value)]}
        if not bad["measures"]:
            return
        engines = (("generator", self.g_engine), ("discriminators", self.d_engine))
        for which, engine in engines:
            named = engine.module.named_parameters()
            bad[which] = [name for name, weight in named if not weight.isfinite().all()]
        found = "; ".join(f"{which} {_some(names)}" for which, names in bad.items() if names)
        raise NonFiniteError(f"stage {self.stage_number}, step {self.step}: not finite: {found}")


def _some(names: list[str], shown: int = 3) -> str:
    """The first few: one bad weight soon spoils all others."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _halves(scores: Scores) -> tuple[Scores, Scores]:
    """Undo `_joined`: the reals' scores and the fakes'."""
    spatial, temporal = scores.spatial.chunk(2), scores.temporal.chunk(2)
    matching = (None, None) if scores.matching is None else scores.matching.chunk(2)
    real, fake = (Scores(*s) for s in zip(spatial, temporal, matching, strict=True))
    return real, fake


def _detached(fake: FakeBatch) -> FakeBatch:
    low = None if fake.low_BTCHW is None else fake.low_BTCHW.detach()
    return fake._replace(video_BTCHW=fake.video_BTCHW.detach(), low_BTCHW=low)


def _joined(real: RealBatch, fake: FakeBatch) -> RealBatch:
    """Reals, then fakes, along the batch."""

    def both(r: Tensor | None, f: Tensor | None) -> Tensor | None:
        return None if r is None or f is None else torch.cat([r, f])

    return RealBatch(
        torch.cat([real.video_BTCHW, fake.video_BTCHW]),
        both(real.low_BTCHW, fake.low_BTCHW),
        both(real.labels_B, fake.labels_B),
    )
