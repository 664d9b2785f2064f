"""The builder of all that one stage trains: networks, engines, fakes, reals, and the step."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from engine.batches import accumulation_steps
from engine.configuration import Config
from engine.models.construction import (
    build_discriminators,
    build_generator,
    build_joint_generator,
)
from engine.models.norms import synchronize_norms
from engine.processors import cores_per_process
from engine.trainer.averaging import WeightAverage
from engine.trainer.deepspeed_engines import make_engine
from engine.trainer.fakes import (
    ClipFakes,
    Fakes,
    GeneratedWindows,
    JointFakes,
    LatentSource,
    RealWindows,
    WindowFakes,
)
from engine.trainer.previous import PreviousStages
from engine.trainer.ranks import Ranks, derived_seed
from engine.trainer.reals import ClipSource, Reals
from engine.trainer.sample_bank import BankedWindows, batches_per_rank
from engine.trainer.step import Trainer
from engine.video.dataset import DataFacts
from engine.video.index import VideoIndex

if TYPE_CHECKING:
    from engine.video.loader import ClipLoader

# The streams of random numbers of a stage's run.
WEIGHTS, LATENTS, SAMPLES, CLIPS = "weights", "latents", "samples", "clips"
STATISTICS, BANK, RESUMED = "statistics", "bank", "resumed"


@dataclass(frozen=True)
class StageBuilder:
    """Builds a stage's trainer and its parts; the fields are all that they depend on."""

    config: Config
    number: int
    ranks: Ranks
    facts: DataFacts
    previous: PreviousStages | None = None
    """The frozen earlier stages, which `trainer`, `fakes` and `bank` need where
    `stage_plan.needs_previous`; the other parts do without."""

    def seed(self, stream: str, rank: int = 0) -> int:
        """The seed of one stream."""
        run_seed = self.config.stages[self.number].training.seed
        return derived_seed(stream, run_seed, self.number, rank)

    def resumed_seed(self, step: int) -> int:
        """The seed of this rank's latents where a run goes on at `step` on other ranks."""
        ranks, run_seed = self.ranks, self.config.stages[self.number].training.seed
        return derived_seed(RESUMED, run_seed, self.number, ranks.rank, ranks.world_size, step)

    @property
    def frames_per_second(self) -> float:
        """At which this stage's output plays in the data's own time."""
        return self.facts.frames_per_second / self.config.stages[self.number].frame_stride

    def trainer(self, loader: ClipSource) -> Trainer:
        """The training step, with freshly initialised networks."""
        stage, training = self.config.stages[self.number], self.config.stages[self.number].training
        torch.manual_seed(self.seed(WEIGHTS))
        build = build_joint_generator if stage.joint else build_generator
        device = self.ranks.device
        # On the CPU, so that a seed gives the same weights everywhere; a rehearsal has no weights.
        with torch.device(device if device.type == "meta" else "cpu"):
            generator = build(self.config, self.number).to(device)
            discriminators = build_discriminators(self.config, self.number).to(device)
        if training.synchronized_norms and self.ranks.world_size > 1:
            synchronize_norms(generator, dist.group.WORLD)
        average = (
            WeightAverage(generator, decay=training.ema_decay, zero_stage=training.zero_stage)
            if training.ema_decay is not None
            else None
        )
        num_micro_batches = accumulation_steps(training, self.ranks.world_size)
        g_engine, d_engine = (
            make_engine(
                network,
                lr=lr,
                training=training,
                world_size=self.ranks.world_size,
                accumulation_steps=num_micro_batches,
            )
            for network, lr in (
                (generator, training.generator_lr),
                (discriminators, training.discriminator_lr),
            )
        )
        reals = Reals(loader, self.config, self.number)
        latents = self.latents(self.seed(LATENTS, self.ranks.rank))
        bank = None if training.sample_bank is None else self.bank(latents.random)
        return Trainer(
            stage_number=self.number,
            stage=stage,
            g_engine=g_engine,
            d_engine=d_engine,
            # Samples to look at are never the bank's: `fakes` does not know it.
            fakes=WindowFakes(self.number, latents, bank) if bank else self.fakes(latents, reals),
            reals=reals,
            random=latents.random,
            accumulation_steps=num_micro_batches,
            average=average,
            bank=bank,
        )

    def latents(self, seed: int) -> LatentSource:
        """A stream of z and labels."""
        return LatentSource(self.config, self.facts.class_counts, seed, self.ranks.device)

    def loader(self, index: VideoIndex) -> "ClipLoader":
        """This rank's share of the real clips, at this stage's resolution, length and stride."""
        # Only decoding needs DALI, which is not installed wherever a step can run.
        from engine.video.loader import ClipLoader

        stage, data = self.config.stages[self.number], self.config.data
        return ClipLoader(
            index,
            num_frames=stage.num_frames,
            frame_stride=stage.frame_stride,
            resolution=self.config.resolution,
            view_resolution=stage.resolution,
            batch_size=stage.training.samples_per_pass,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            seed=self.seed(CLIPS),
            random_crop=data.random_crop,
            horizontal_flip=data.horizontal_flip,
            decoder=data.decoder,
            device=self.ranks.device,
            num_threads=data.num_threads or cores_per_process(),
            replace_failed=True,
        )

    def bank(self, random: torch.Generator) -> BankedWindows:
        """This rank's share of the bank, still empty; `random` draws from it."""
        training = self.config.stages[self.number].training
        assert training.sample_bank is not None
        assert self.previous is not None
        path = training.seed, self.number, self.ranks.rank
        return BankedWindows(
            self.previous.cascade,
            self.number,
            latents_of=lambda batch: self.latents(derived_seed(BANK, *path, batch)),
            random=random,
            batch_size=training.samples_per_pass,
            num_batches=batches_per_rank(training.sample_bank, training, self.ranks.world_size),
            refresh_every=training.sample_bank.refresh_every,
        )

    def fakes(self, latents: LatentSource, reals: Reals | None) -> Fakes:
        """The way this stage makes fakes."""
        stage = self.config.stages[self.number]
        if stage.joint:
            return JointFakes(self.config, self.number, latents)
        if self.number == 1:
            return ClipFakes(self.config, self.number, latents)
        if stage.training.condition_on == "data":
            assert reals is not None
            return WindowFakes(self.number, latents, RealWindows(reals))
        assert self.previous is not None, "checked before training starts"
        windows = GeneratedWindows(self.previous.cascade, self.number, latents)
        return WindowFakes(self.number, latents, windows)
