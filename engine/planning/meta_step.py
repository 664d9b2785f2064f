"""A training step of the real networks on the meta device: the memory and the FLOPs it takes.

The step is `engine.trainer.step.Trainer`'s own, D update and G update, with the frozen stages that
make the windows for stage 2 and later. Only DeepSpeed is left out. Its memory does not depend on
the batch, and `rank_memory.py` adds it; the gradients that DeepSpeed would take away stand here in
`.grad` until the update ends.

The same code runs on a CPU with real tensors, so the tests can hold it against an allocator.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import deepspeed
import torch
from torch import Tensor, nn

import kernels
from engine.configuration import Config
from engine.models.cascade import GeneratorCascade
from engine.models.construction import (
    build_discriminators,
    build_generator,
    build_joint_generator,
)
from engine.models.operators import hand_operators
from engine.planning.counters import (
    BACKWARD,
    CUDA_BLOCK_BYTES,
    FROZEN,
    PARAMETERS,
    ChannelsLastConvolutions,
    Phases,
    Update,
    UpdateBytes,
    WorkByPhase,
)
from engine.planning.forward_pass import frozen_stages
from engine.trainer.fakes import (
    ClipFakes,
    Fakes,
    GeneratedWindows,
    JointFakes,
    LatentSource,
    RealWindows,
    WindowFakes,
    WindowSource,
)
from engine.trainer.reals import Reals
from engine.trainer.step import Trainer
from kernels.common.large_batches import MOST_VALUES


@dataclass
class Step:
    """A micro-batch of a step."""

    micro_batch: int
    discriminator_update: Update
    generator_update: Update
    parameter_bytes: int
    """Of G, D and the frozen stages, with the buffers of spectral norm."""
    generator_sizes: list[int]
    """How many values each of G's parameters has, in their order."""
    discriminator_sizes: list[int]

    @property
    def updates(self) -> dict[str, Update]:
        """The two updates, by the network that is updated."""
        return {"D": self.discriminator_update, "G": self.generator_update}

    @property
    def most_samples(self) -> int:
        """The largest micro-batch in which no tensor has more values than 32 bits count.

        Beyond it convolutions run in parts (kernels/common/large_batches.py), and no kernel has
        been tried on a GPU.
        """
        most_values = max(update.most_values for update in self.updates.values())
        return MOST_VALUES * self.micro_batch // max(most_values, 1)


class UnfilledClips(NamedTuple):
    """One batch of `EmptyClips`."""

    video_BTCHW: Tensor
    labels_B: Tensor


class EmptyClips:
    """A loader of clips that nobody filled, channels last in memory as decoded ones are."""

    def __init__(self, config: Config, number: int, device: torch.device) -> None:
        stage = config.stages[number]
        self._shape = stage.num_frames, stage.resolution, stage.resolution, 3
        self._batch, self._device = stage.training.samples_per_pass, device

    def __next__(self) -> UnfilledClips:
        video = torch.zeros(self._batch, *self._shape, device=self._device)
        labels = torch.zeros(self._batch, dtype=torch.long, device=self._device)
        return UnfilledClips(video.permute(0, 1, 4, 2, 3), labels)

    def state_dict(self) -> dict[str, Any]:
        """No position."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do."""


class EngineWithoutOptimizer:
    """Stands in for DeepSpeed's engine in a `Trainer`, without an optimizer and other ranks."""

    def __init__(self, module: nn.Module, device: torch.device, phases: Phases) -> None:
        self.module, self.device = module, device
        self._phases = phases

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The network's forward pass."""
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Gradients into `.grad`."""
        with self._phases.during(BACKWARD):
            loss.backward()

    def is_gradient_accumulation_boundary(self) -> bool:
        """Every micro-batch is the last."""
        return True

    def step(self) -> None:
        """Drop the gradients, where DeepSpeed would use them."""
        for parameter in self.module.parameters():
            parameter.grad = None


class FrozenWindows:
    """Windows of the frozen stages, in a phase of their own."""

    def __init__(self, source: WindowSource, phases: Phases) -> None:
        self._source, self._phases = source, phases

    def __call__(self, batch_size: int) -> tuple[Tensor | None, Tensor]:
        """The source's labels and windows."""
        with self._phases.during(FROZEN):
            return self._source(batch_size)


class WindowsOfWholeVideos(GeneratedWindows):
    """Windows cut from whole videos, which the frozen stages make as they do to fill a bank."""

    @torch.no_grad()
    def __call__(self, batch_size: int) -> tuple[Tensor | None, Tensor]:
        """Labels [B] and x_l, as `GeneratedWindows` gives them."""
        source = self._source
        zs, labels_B = source.latents(batch_size, self._number - 1), source.labels(batch_size)
        video = self._cascade.sample_previous(self._number, zs, labels_B, source.random)
        return labels_B, self._cascade.draw_windows(self._number, video, source.random)


class MetaStep:
    """One stage's networks, and the step over them."""

    def __init__(
        self,
        config: Config,
        number: int,
        device: torch.device | str = "meta",
        operators: Any = kernels,
    ) -> None:
        self._config, self._number, self._device = config, number, torch.device(device)
        stage = config.stages[number]
        self._phases = Phases()
        with torch.device(self._device):
            build = build_joint_generator if stage.joint else build_generator
            generator: nn.Module = build(config, number)
            discriminators = build_discriminators(config, number)
            frozen = self._frozen(operators)
        for network in (generator, discriminators):
            hand_operators(network, operators)
        counts = (1,) * (config.data.num_classes or 1)
        latents = LatentSource(config, counts, seed=0, device=self._device)
        reals = Reals(EmptyClips(config, number, self._device), config, number)
        fakes: Fakes = ClipFakes(config, number, latents)
        if stage.joint:
            fakes = JointFakes(config, number, latents)
        elif frozen is not None:
            banked = stage.training.sample_bank is not None
            source = (WindowsOfWholeVideos if banked else GeneratedWindows)(frozen, number, latents)
            windows = FrozenWindows(source, self._phases)
            fakes = WindowFakes(number, latents, windows)
        elif number > 1:
            fakes = WindowFakes(number, latents, RealWindows(reals))
        engines = [
            cast(
                deepspeed.DeepSpeedEngine,
                EngineWithoutOptimizer(network, self._device, self._phases),
            )
            for network in (generator, discriminators)
        ]
        # DeepSpeed's part is left out, so there is nothing to gather.
        training = self._training = stage.training.model_copy(update={"zero_stage": 0})
        self._trainer = Trainer(
            stage_number=number,
            stage=stage.model_copy(update={"training": training}),
            g_engine=engines[0],
            d_engine=engines[1],
            fakes=fakes,
            reals=reals,
            random=latents.random,
            accumulation_steps=1,
            average=None,
        )
        self._networks: tuple[nn.Module, ...] = generator, discriminators
        self._frozen_networks = [] if frozen is None else [frozen]

    def d_step(self) -> object:
        """D's update: the last one of an iteration, which may keep its fakes for G's."""
        return self._trainer.d_step(keep_fakes=self._training.reuse_fakes)

    def g_step(self) -> object:
        """G's update."""
        return self._trainer.g_step()

    def run(self, *, block_bytes: int = 1) -> Step:
        """One D update and one G update of a micro-batch."""
        updates = Update(), Update()
        live = UpdateBytes(self._phases, block_bytes=block_bytes)
        with ChannelsLastConvolutions(), live:  # the counters within see the layout it makes
            for network in (*self._networks, *self._frozen_networks):
                live.register(PARAMETERS, network.parameters())
                live.register(PARAMETERS, network.buffers())
                live.watch_gradients(network.parameters())
            for update, run in zip(updates, (self.d_step, self.g_step), strict=True):
                with WorkByPhase(update, self._phases), live.counted_for(update):
                    run()
            parameter_bytes = live.now[PARAMETERS]
        sizes = [[p.numel() for p in network.parameters()] for network in self._networks]
        return Step(self._training.samples_per_pass, *updates, parameter_bytes, *sizes)

    def _frozen(self, operators: Any) -> GeneratorCascade | None:
        """The stages before, on fixed statistics, where they make this one's windows."""
        stage = self._config.stages[self._number]
        if self._number == 1 or stage.joint or stage.training.condition_on != "generated":
            return None
        return frozen_stages(self._config, self._number, operators)


def run_step(
    config: Config,
    number: int,
    *,
    implementations: str = "cuda",
    device: str = "meta",
    block_bytes: int = CUDA_BLOCK_BYTES,
    operators: Any = kernels,
) -> Step:
    """One micro-batch of stage `number`.

    Operators run as their implementations for "cuda" or "cpu" would; the networks may be handed
    others than `kernels` has.
    """
    with kernels.meta_as(implementations):
        return MetaStep(config, number, device, operators).run(block_bytes=block_bytes)
