"""The stages together: generating whole videos, windows for training, and joint training.

Shapes: B batch, T frames, C channels, H x W pixels. `zs` holds one latent [B, Z] per stage.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from engine.configuration import Config
from engine.models.chunks import clip_chunks, cut_at, upsampled_chunks
from engine.models.generator import ClipGenerator
from engine.models.spectral import settle_weights
from engine.models.upsampler import UpsamplingGenerator
from engine.transfers import to_device


def draw_window_starts(
    batch: int, num_frames: int, window: int, generator: torch.Generator | None = None
) -> Tensor:
    """Where each sample's window of `window` out of `num_frames` frames begins; [B] int64."""
    if window > num_frames:
        raise ValueError(f"a window of {window} frames does not fit into {num_frames}")
    device = "cpu" if generator is None else generator.device
    return torch.randint(num_frames - window + 1, (batch,), generator=generator, device=device)


def take_windows(video_BTCHW: Tensor, starts_B: Tensor, window: int) -> Tensor:
    """`window` frames of each sample from its own start; differentiable, [B, window, C, H, W]."""
    frames_BW = window_frames(starts_B, window, video_BTCHW.device)
    samples = torch.arange(len(video_BTCHW), device=video_BTCHW.device)[:, None]
    return video_BTCHW[samples, frames_BW]


def window_frames(starts_B: Tensor, window: int, device: torch.device) -> Tensor:
    """Numbers of the frames in windows of `window` that begin at `starts_B`; [B, window]."""
    return to_device(starts_B, device)[:, None] + torch.arange(window, device=device)


def _split(generators: Sequence[nn.Module]) -> tuple[ClipGenerator, list[UpsamplingGenerator]]:
    first, *later = generators
    if not isinstance(first, ClipGenerator):
        raise TypeError(f"stage 1 must be a ClipGenerator, not {type(first).__name__}")
    upsamplers = [stage for stage in later if isinstance(stage, UpsamplingGenerator)]
    if len(upsamplers) != len(later):
        raise TypeError("stages after the first must be UpsamplingGenerators")
    return first, upsamplers


class GeneratorCascade(nn.Module):
    """Stages 1 to n of a configuration, each running over the whole of the previous one's video.

    `generators` may be fewer than the configuration has. Norm statistics of all of them are
    collected at once: `collect_statistics(cascade, lambda i: cascade.generate(...), 200)`.
    """

    def __init__(self, generators: Sequence[nn.Module], config: Config) -> None:
        super().__init__()
        _split(generators)
        self.generators = nn.ModuleList(generators)
        self.config = config

    def freeze(self) -> "GeneratorCascade":
        """Train no more: without gradients, every weight divided by its σ once. Returns itself."""
        first, upsamplers = _split(list(self.generators))
        for generator in (first, *upsamplers):
            settle_weights(generator, generator.compute_dtype)
        return self.requires_grad_(False)

    @torch.no_grad()
    def generate(self, zs: Sequence[Tensor], labels_B: Tensor | None, num_frames: int) -> Tensor:
        """Videos of any length from the last of the stages, [B, num_frames, 3, H, W] in [-1, 1].

        Stage 1 makes the fewest frames that suffice; what they unroll to is cropped at the end.
        """
        self._check_latents(zs, len(self.generators))
        first, upsamplers = _split(list(self.generators))
        total_step = 1
        for upsampler in upsamplers:
            total_step *= upsampler.frame_step
        video = first(zs[0], labels_B, -(-num_frames // total_step))
        for upsampler, z in zip(upsamplers, zs[1:], strict=True):
            video = upsampler.unroll(z, labels_B, video)
        return video[:, :num_frames]

    def stream(
        self,
        zs: Sequence[Tensor],
        labels_B: Tensor | None,
        ends: Sequence[int],
        on_chunk: Callable[[int, Tensor], object] = lambda number, video_BTCHW: None,
    ) -> Iterator[Tensor]:
        """What `generate` makes of `ends[-1]` frames, a chunk up to each of `ends` at a time.

        Statistics must be fixed, at any length (`chunks.statistics_rows`). No stage keeps more than
        a chunk and what it needs beyond it. `on_chunk` is given what each stage before the last
        makes, with the stage's number.
        """
        self._check_latents(zs, len(self.generators))
        first, upsamplers = _split(list(self.generators))
        unrolling = self.config.unrolling(len(self.generators))
        num_first = -(-ends[-1] // unrolling)

        def ends_at(number: int) -> list[int]:
            """The same in frames of an earlier stage, of whose clip all is used."""
            made = self.config.unrolling(number)
            reached = {-(-end * made // unrolling) for end in ends[:-1]}
            return sorted({*reached, num_first * made})

        def told(number: int, chunks: Iterator[Tensor]) -> Iterator[Tensor]:
            for video_BTCHW in chunks:
                on_chunk(number, video_BTCHW)
                yield video_BTCHW

        chunks = clip_chunks(first, zs[0], labels_B, ends_at(1))
        for number, (upsampler, z) in enumerate(zip(upsamplers, zs[1:], strict=True), start=2):
            chunks = upsampled_chunks(
                upsampler,
                z,
                labels_B,
                told(number - 1, chunks),
                ends_at(number - 1),
                period=self.config.unrolling(number),
            )
        return cut_at(chunks, ends)

    @torch.no_grad()
    def sample_previous(
        self,
        stage_number: int,
        zs: Sequence[Tensor],
        labels_B: Tensor | None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """What the training inputs of stage `stage_number` > 1 are windows of.

        Stage 1 makes its whole training clip; each later stage upsamples a random window of the
        video before, of the length that it is trained on. Decided: the paper does not say what a
        third stage is trained on. Returns [B, T, 3, h, w] of the last one.
        """
        first, upsamplers = self._check_previous(stage_number, zs)
        if stage_number == 2:
            return first(zs[0], labels_B, self.config.stages[1].num_frames)
        low = self.sample_window(stage_number - 1, zs[:-1], labels_B, generator)
        return upsamplers[stage_number - 3](zs[-1], labels_B, low)

    def draw_windows(
        self, stage_number: int, video_BTCHW: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """A random window of each of the previous stage's videos, as stage `stage_number` takes."""
        window = self.config.upsampling(stage_number).num_frames
        starts_B = draw_window_starts(len(video_BTCHW), video_BTCHW.shape[1], window, generator)
        return take_windows(video_BTCHW, starts_B, window)

    @torch.no_grad()
    def sample_window(
        self,
        stage_number: int,
        zs: Sequence[Tensor],
        labels_B: Tensor | None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """A training input of stage `stage_number` > 1 made by the stages before it.

        A random window of what `sample_previous` gives: [B, t, 3, h, w].
        """
        if stage_number > 2:
            video = self.sample_previous(stage_number, zs, labels_B, generator)
            return self.draw_windows(stage_number, video, generator)
        # Stage 1 is told the window: behind its last ConvGRU it need not make the other frames.
        first, _ = self._check_previous(stage_number, zs)
        num_frames = self.config.stages[1].num_frames
        window = self.config.upsampling(2).num_frames
        starts_B = draw_window_starts(len(zs[0]), num_frames, window, generator)
        frames_BW = window_frames(starts_B, window, zs[0].device)
        return first(zs[0], labels_B, num_frames, frames_BW)

    def _check_previous(
        self, stage_number: int, zs: Sequence[Tensor]
    ) -> tuple[ClipGenerator, list[UpsamplingGenerator]]:
        """The generators that make stage `stage_number`'s input. Raises ValueError without them."""
        num_previous = stage_number - 1
        if not 1 <= num_previous <= len(self.generators):
            raise ValueError(
                f"no input for stage {stage_number} from {len(self.generators)} stages"
            )
        self._check_latents(zs, num_previous)
        return _split(list(self.generators))

    def _check_latents(self, zs: Sequence[Tensor], num_stages: int) -> None:
        if len(zs) != num_stages:
            raise ValueError(f"{num_stages} stages need as many latents, not {len(zs)}")


class JointGenerator(nn.Module):
    """Stages 1 to n trained together, judged at stage n only (Appendix H).

    Computes what `GeneratorCascade.sample_window` and stage n do, with gradients through all of
    them.
    """

    def __init__(self, generators: Sequence[nn.Module], config: Config) -> None:
        super().__init__()
        _split(generators)
        if len(generators) < 2:
            raise ValueError("joint training needs at least two stages")
        self.generators = nn.ModuleList(generators)
        self.config = config

    def forward(
        self, zs: Sequence[Tensor], labels_B: Tensor | None, window_starts: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """(x_l window of the last stage, its video); see `draw_window_starts` below."""
        first, upsamplers = _split(list(self.generators))
        if len(zs) != 1 + len(upsamplers) or len(window_starts) != len(upsamplers):
            raise ValueError(
                f"{1 + len(upsamplers)} stages need as many latents (not {len(zs)}) and one window "
                f"start fewer (not {len(window_starts)})"
            )
        low = video = first(zs[0], labels_B, self.config.stages[1].num_frames)
        for number, (upsampler, starts_B) in enumerate(
            zip(upsamplers, window_starts, strict=True), start=2
        ):
            low = take_windows(video, starts_B, self.config.upsampling(number).num_frames)
            video = upsampler(zs[number - 1], labels_B, low)
        return low, video

    def draw_window_starts(
        self, batch: int, generator: torch.Generator | None = None
    ) -> list[Tensor]:
        """For every stage after the first, where each sample's input window begins, [B]."""
        return [
            draw_window_starts(
                batch,
                self.config.stages[number - 1].num_frames,
                self.config.upsampling(number).num_frames,
                generator,
            )
            for number in range(2, len(self.generators) + 1)
        ]
