"""A training step of the real networks on the meta device: what it keeps, and what it computes.

The step is `engine.trainer.step.Trainer`'s own, D update and G update, including the frozen stages
whose windows stage 2 and later upsample. Only DeepSpeed is left out: its memory does not depend on
the batch and is in `zero_memory`; the gradients that it takes away stand here in `.grad` until the
update ends.

The same code runs on a CPU with real tensors, which is how the tests hold it against an allocator.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import deepspeed
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import kernels
from engine.configuration import Config
from engine.models.cascade import Cascade
from engine.models.construction import (
    build_discriminators,
    build_generator,
    build_joint_generator,
)
from engine.models.norms import frame_norms
from engine.planning.live_bytes import ACTIVATIONS, GRADIENTS, PARAMETERS, LiveBytes
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

FROZEN, FORWARD, BACKWARD = "frozen stages", "forward", "backward"


@dataclass
class Update:
    """What one update, of D or of G, of one micro-batch keeps and computes."""

    most: dict[tuple[str, int], int] = field(default_factory=dict)
    """(phase, bytes of gradients in it) → the most bytes of everything but gradients, parameters
    and optimizer state that lived at such a moment."""
    flops: Counter[str] = field(default_factory=Counter)
    """Executed in each phase: convolutions and matrix products, two per multiply-add."""


@dataclass
class Step:
    """A micro-batch of a step."""

    micro_batch: int
    discriminator_update: Update
    generator_update: Update
    parameter_bytes: int
    """Of G, D and the frozen stages, with the buffers of spectral norm."""


class Clips(NamedTuple):
    """One batch of a loader."""

    video_BTCHW: Tensor
    labels_B: Tensor


class EmptyClips:
    """A loader of clips that nobody filled, channels last in memory as decoded ones are."""

    def __init__(self, config: Config, number: int, device: torch.device) -> None:
        stage = config.stages[number]
        self._shape = stage.num_frames, stage.resolution, stage.resolution, 3
        self._batch, self._device = stage.training.micro_batch, device

    def __next__(self) -> Clips:
        video = torch.zeros(self._batch, *self._shape, device=self._device)
        labels = torch.zeros(self._batch, dtype=torch.long, device=self._device)
        return Clips(video.permute(0, 1, 4, 2, 3), labels)

    def state_dict(self) -> dict[str, Any]:
        """No position."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do."""


class PlainEngine:
    """What `Trainer` needs of DeepSpeed's engine, without an optimizer and other ranks."""

    def __init__(self, module: nn.Module, device: torch.device, phases: "Phases") -> None:
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


class Phases:
    """Says in which phase of an update the code is."""

    def __init__(self) -> None:
        self.now = FORWARD

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Until the context ends."""
        before, self.now = self.now, phase
        try:
            yield
        finally:
            self.now = before


class UpdateBytes(LiveBytes):
    """Live bytes, the most of them beside every amount of gradients, by phase."""

    def __init__(self, update: Update, phases: Phases, *, block_bytes: int) -> None:
        super().__init__(block_bytes=block_bytes)
        self._most, self._phases = update.most, phases

    def changed(self) -> None:
        """Take note."""
        super().changed()
        key = self._phases.now, self.now[GRADIENTS]
        if self.now[ACTIVATIONS] > self._most.get(key, -1):
            self._most[key] = self.now[ACTIVATIONS]


class FlopsByPhase(TorchDispatchMode):
    """Counts as `FlopCounterMode` does, whose hooks on modules would keep tensors alive."""

    def __init__(self, update: Update, phases: Phases) -> None:
        super().__init__()
        self._flops, self._phases = update.flops, phases

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run, then count."""
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self._flops[self._phases.now] += formula(*args, **(kwargs or {}), out_val=result)
        return result


class ChannelsLastConvolutions(TorchDispatchMode):
    """Convolutions answer channels last where their input is, as cuDNN's and oneDNN's do.

    PyTorch's meta convolution answers in another layout than the real one, after which the
    networks would seem to copy.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run; lay out the result anew."""
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            return _laid_out(result, like=args[0])
        if func is torch.ops.aten.convolution_backward.default:
            return tuple(
                None if grad is None else _laid_out(grad, like=args[1] if grad.ndim > 1 else grad)
                for grad in result
            )
        return result


def _laid_out(result: Tensor, like: Tensor) -> Tensor:
    if not result.is_meta or like.ndim not in (4, 5):
        return result
    layout = torch.channels_last if like.ndim == 4 else torch.channels_last_3d
    if not like.is_contiguous(memory_format=layout):
        return result
    return torch.empty_like(result, memory_format=layout)


class FrozenWindows:
    """Windows of the frozen stages, in a phase of their own."""

    def __init__(self, source: WindowSource, phases: Phases) -> None:
        self._source, self._phases = source, phases

    def __call__(self, batch_size: int) -> tuple[Tensor | None, Tensor]:
        """As the source's."""
        with self._phases.during(FROZEN):
            return self._source(batch_size)


class MetaStep:
    """One stage's networks, and the step over them."""

    def __init__(self, config: Config, number: int, device: torch.device | str = "meta") -> None:
        self._config, self._number, self._device = config, number, torch.device(device)
        stage = config.stages[number]
        self._phases = Phases()
        with torch.device(self._device):
            build = build_joint_generator if stage.joint else build_generator
            generator: nn.Module = build(config, number)
            discriminators = build_discriminators(config, number)
            frozen = self._frozen()
        counts = (1,) * (config.data.num_classes or 1)
        latents = LatentSource(config, counts, seed=0, device=self._device)
        reals = Reals(EmptyClips(config, number, self._device), config, number)
        fakes: Fakes = ClipFakes(config, number, latents)
        if stage.joint:
            fakes = JointFakes(config, number, latents)
        elif frozen is not None:
            windows = FrozenWindows(GeneratedWindows(frozen, number, latents), self._phases)
            fakes = WindowFakes(number, latents, windows)
        elif number > 1:
            fakes = WindowFakes(number, latents, RealWindows(reals))
        engines = [
            cast(deepspeed.DeepSpeedEngine, PlainEngine(network, self._device, self._phases))
            for network in (generator, discriminators)
        ]
        # DeepSpeed's part is left out, so there is nothing to gather.
        training = stage.training.model_copy(update={"zero_stage": 0})
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
        networks = [generator, discriminators, *([] if frozen is None else [frozen])]
        self._tensors = [
            tensor for network in networks for tensor in (*network.parameters(), *network.buffers())
        ]
        self._trained = [p for network in networks[:2] for p in network.parameters()]

    def run(self, *, block_bytes: int = 1) -> Step:
        """One D update and one G update of a micro-batch."""
        updates, parameter_bytes = [], 0
        for run in (self._trainer.d_step, self._trainer.g_step):
            update = Update()
            with ExitStack() as stack:
                stack.enter_context(ChannelsLastConvolutions())  # within: others see its results
                stack.enter_context(FlopsByPhase(update, self._phases))
                live = UpdateBytes(update, self._phases, block_bytes=block_bytes)
                stack.enter_context(live)
                live.register(PARAMETERS, self._tensors)
                live.watch_gradients(self._trained)
                run()
                parameter_bytes = live.now[PARAMETERS]
            updates.append(update)
        micro_batch = self._config.stages[self._number].training.micro_batch
        return Step(micro_batch, *updates, parameter_bytes)

    def _frozen(self) -> Cascade | None:
        """The stages before, on fixed statistics, where they make this one's windows."""
        stage = self._config.stages[self._number]
        if self._number == 1 or stage.joint or stage.training.condition_on != "generated":
            return None
        generators = [build_generator(self._config, n) for n in range(1, self._number)]
        for n, generator in enumerate(generators, start=1):
            num_frames = self._config.stages[n].num_frames
            for norm in frame_norms(generator).values():
                channels = norm.gain.normalized.u.numel()
                norm.fix((torch.zeros(num_frames, channels), torch.ones(num_frames, channels)))
        return Cascade(generators, self._config).requires_grad_(False)


def run_step(
    config: Config,
    number: int,
    *,
    forms: str = "cuda",
    device: str = "meta",
    block_bytes: int = 512,
) -> Step:
    """One micro-batch of stage `number` with the operators' forms of `forms`, "cuda" or "cpu"."""
    with kernels.meta_as(forms):
        return MetaStep(config, number, device).run(block_bytes=block_bytes)
