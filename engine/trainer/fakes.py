"""Inputs of a generator and the fakes it makes of them: one class per way of training a stage.

- `ClipFakes`: stage 1 and DVD-GAN, from noise.
- `WindowFakes`: stage 2 and later, from noise and a window of the previous stage's video. In the
  paper the window is one that the frozen earlier stages generate; `--condition-on data` takes it
  from real clips instead.
- `JointFakes`: all stages at once (Appendix H).

Each draws `inputs`, in which everything random is, and runs a network on them: a step is a function
of its inputs. Random numbers come from a `torch.Generator` on the CPU. They are the same on every
device, and its state is saved with the checkpoint.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from engine.configuration import Config
from engine.models.cascade import GeneratorCascade, draw_window_starts
from engine.trainer.reals import Reals
from engine.transfers import to_device


class FakeBatch(NamedTuple):
    """A generated batch, and what it was conditioned on."""

    video_BTCHW: Tensor
    low_BTCHW: Tensor | None
    labels_B: Tensor | None


Inputs = dict[str, Any]


class Fakes(Protocol):
    """Draws a generator's inputs and runs it on them."""

    def draw(self, batch_size: int) -> Inputs:
        """Latents, labels and condition for one batch."""
        ...

    def run(self, generator: nn.Module, inputs: Inputs) -> FakeBatch:
        """Generate from drawn inputs."""
        ...


class LatentSource:
    """z ~ N(0, σ²I), σ = 1 in training, and labels with the data set's frequencies.

    Decided: the paper does not say how fakes' classes are drawn.
    """

    def __init__(
        self,
        config: Config,
        class_counts: Sequence[int],
        seed: int,
        device: torch.device,
        *,
        sigma: float = 1.0,
    ) -> None:
        self._sigma = sigma
        self._stages = config.stages
        self.random = torch.Generator().manual_seed(seed)
        self.device = device
        self._frequencies = (
            None
            if config.data.num_classes is None
            else torch.tensor(class_counts, dtype=torch.float64)
        )

    def latent(self, batch_size: int, stage_number: int) -> Tensor:
        """One stage's z, [B, Z], on the device."""
        size = self._stages[stage_number].generator.latent_size
        z_BZ = self._sigma * torch.randn(batch_size, size, generator=self.random)
        return to_device(z_BZ, self.device)

    def latents(self, batch_size: int, num_stages: int) -> list[Tensor]:
        """A z for each of the stages 1 to `num_stages`."""
        return [self.latent(batch_size, n) for n in range(1, num_stages + 1)]

    def labels(self, batch_size: int) -> Tensor | None:
        """[B] int64, or None without classes."""
        if self._frequencies is None:
            return None
        drawn = torch.multinomial(
            self._frequencies, batch_size, replacement=True, generator=self.random
        )
        return to_device(drawn, self.device)


class ClipFakes:
    """Whole clips from noise: stage 1 and DVD-GAN."""

    def __init__(self, config: Config, number: int, source: LatentSource) -> None:
        self._number = number
        self._num_frames = config.stages[number].num_frames
        self._source = source

    def draw(self, batch_size: int) -> Inputs:
        """z [B, Z] and labels [B]."""
        return {
            "z_BZ": self._source.latent(batch_size, self._number),
            "labels_B": self._source.labels(batch_size),
            "num_frames": self._num_frames,
        }

    def run(self, generator: nn.Module, inputs: Inputs) -> FakeBatch:
        """The generator's clip; stage 1 has no condition."""
        return FakeBatch(generator(**inputs), None, inputs["labels_B"])


class WindowFakes:
    """Upsampled windows: stage 2 and later."""

    def __init__(self, number: int, source: LatentSource, windows: "WindowSource") -> None:
        self._number = number
        self._source = source
        self._windows = windows

    def draw(self, batch_size: int) -> Inputs:
        """z [B, Z], labels [B] and the window to upsample, [B, T_low, 3, h, h]."""
        labels_B, low_BTCHW = self._windows(batch_size)
        return {
            "z_BZ": self._source.latent(batch_size, self._number),
            "labels_B": labels_B,
            "low_BTCHW": low_BTCHW,
        }

    def run(self, generator: nn.Module, inputs: Inputs) -> FakeBatch:
        """The upsampled window, beside the one it was made from."""
        return FakeBatch(generator(**inputs), inputs["low_BTCHW"], inputs["labels_B"])


class JointFakes:
    """The stages 1 to n as one generator; only the last one's output is judged (Appendix H)."""

    def __init__(self, config: Config, number: int, source: LatentSource) -> None:
        self._config = config
        self._number = number
        self._source = source

    def draw(self, batch_size: int) -> Inputs:
        """A z per stage, labels, and where each later stage's window starts."""
        starts = [
            draw_window_starts(
                batch_size,
                self._config.stages[n - 1].num_frames,
                self._config.upsampling(n).num_frames,
                self._source.random,
            )
            for n in range(2, self._number + 1)
        ]
        return {
            "zs": self._source.latents(batch_size, self._number),
            "labels_B": self._source.labels(batch_size),
            "window_starts": starts,
        }

    def run(self, generator: nn.Module, inputs: Inputs) -> FakeBatch:
        """The last stage's window and the one below it, both with gradients."""
        low_BTCHW, video_BTCHW = generator(**inputs)
        return FakeBatch(video_BTCHW, low_BTCHW, inputs["labels_B"])


WindowSource = Callable[[int], tuple[Tensor | None, Tensor]]


class GeneratedWindows:
    """Windows that the frozen stages before this one generate (the paper's way)."""

    def __init__(self, cascade: GeneratorCascade, number: int, source: LatentSource) -> None:
        self._cascade = cascade
        self._number = number
        self._source = source

    @torch.no_grad()
    def __call__(self, batch_size: int) -> tuple[Tensor | None, Tensor]:
        """Labels [B] and x_l [B, T_low, 3, h, h]."""
        zs = self._source.latents(batch_size, self._number - 1)
        labels_B = self._source.labels(batch_size)
        low = self._cascade.sample_window(self._number, zs, labels_B, self._source.random)
        return labels_B, low


class RealWindows:
    """Windows of real clips, f(x): an easier task than the paper's, for diagnosis."""

    def __init__(self, reals: Reals) -> None:
        self._reals = reals

    def __call__(self, batch_size: int) -> tuple[Tensor | None, Tensor]:
        """Labels [B] and f(x) [B, T_low, 3, h, h]."""
        real = self._reals.next()
        assert real.low_BTCHW is not None
        assert len(real.video_BTCHW) == batch_size
        return real.labels_B, real.low_BTCHW
