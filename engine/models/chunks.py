"""A whole video in chunks of frames: the same video, in memory that does not grow with its length.

With fixed norm statistics a frame depends on other frames only through a generator's temporal
modules, so a chunk is exact if it is given what these read beyond it:

- a ConvGRU goes on from its hidden state after the chunk before (`ClipState`);
- a convolution with three taps reads one frame before and one behind. All of a generator's
  together reach as many frames as there are of them, its halo. A chunk is made with its halo at
  both ends, and what the halo becomes is cut off. At the video's own ends nothing is added: the
  zeros that convolutions pad it with belong to it.

Norm statistics are of one length. `statistics_rows` says which of them the frames of a longer or a
shorter video use.

Shapes: B batch, T frames, C channels, H x W pixels; videos are [B, T, 3, H, W] in [-1, 1]. Where a
chunk ends is told by the number of the frame after it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.models.generator import ClipGenerator, GeneratorTrunk
from engine.models.layers import ConvGRU, SeparableConvolution
from engine.models.norms import frame_norms
from engine.models.prepared import layers_of
from engine.models.upsampler import UpsamplingGenerator


class ClipState(NamedTuple):
    """Where a recurrent generator stands in a video; given back, it goes on from there."""

    num_frames: int = 0
    """Made so far."""
    hidden: tuple[Tensor, ...] = ()
    """Of every ConvGRU after the last of them, [B, C, H, W]."""


@torch.no_grad()
def continue_clip(
    generator: ClipGenerator,
    z_BZ: Tensor,
    labels_B: Tensor | None,
    num_frames: int,
    state: ClipState | None = None,
) -> tuple[Tensor, ClipState]:
    """The next frames [B, num_frames, 3, H, W] of a recurrent generator's clip, and its new state.

    Raises ValueError for a generator that is not recurrent or has no fixed statistics.
    """
    if halo_of(generator):
        raise ValueError("a generator with convolutions in time has no state to go on from")
    state = state or ClipState()
    end = state.num_frames + num_frames
    rows_T = statistics_rows(generator, state.num_frames, end, total=end)
    with _rows_in_use(generator, rows_T), _going_on(generator, state.hidden) as hidden:
        video_BTCHW: Tensor = generator(z_BZ, labels_B, num_frames)
    return video_BTCHW, ClipState(end, tuple(hidden))


@torch.no_grad()
def clip_chunks(
    generator: ClipGenerator, z_BZ: Tensor, labels_B: Tensor | None, ends: Sequence[int]
) -> Iterator[Tensor]:
    """A clip of `ends[-1]` frames from noise, a chunk up to each of `ends`."""
    state, begin, halo = ClipState(), 0, halo_of(generator)
    for end in ends:
        if not halo:
            video_BTCHW, state = continue_clip(generator, z_BZ, labels_B, end - begin, state)
            yield video_BTCHW
        else:
            first, last = max(0, begin - halo), min(ends[-1], end + halo)
            rows_T = statistics_rows(generator, first, last, total=ends[-1])
            with _rows_in_use(generator, rows_T):
                video_BTCHW = generator(z_BZ, labels_B, last - first)
            yield video_BTCHW[:, begin - first : end - first]
        begin = end


@torch.no_grad()
def upsampled_chunks(
    generator: UpsamplingGenerator,
    z_BZ: Tensor,
    labels_B: Tensor | None,
    low_chunks: Iterator[Tensor],
    ends: Sequence[int],
    *,
    period: int = 1,
) -> Iterator[Tensor]:
    """As `UpsamplingGenerator.unroll` over a video x_l that comes in chunks, of any sizes.

    Up to each of `ends` x_l becomes a chunk, of `frame_step` frames for each of its own; the last
    is its length. `period` as in `statistics_rows`.
    """
    edge, step = generator.edge_frames, generator.frame_step
    low = _Frames(_continued(low_chunks, edge))
    total = ends[-1] + 2 * edge
    reach = -(-halo_of(generator) // step)
    hidden: Sequence[Tensor] = ()
    begin = 0
    for end in ends:
        stop = total if end == ends[-1] else end + edge
        first, last = max(0, begin - reach), min(total, stop + reach)
        look_ahead = int(generator.low_frames == "interpolate" and last < total)
        low_BTCHW = low.take(first, last + look_ahead)
        rows_T = statistics_rows(
            generator, first * step, last * step, total=total * step, period=period
        )
        with _rows_in_use(generator, rows_T), _going_on(generator, hidden) as hidden:
            video_BTCHW = generator(z_BZ, labels_B, low_BTCHW, look_ahead=look_ahead)
        wanted = slice((max(begin, edge) - first) * step, (min(stop, total - edge) - first) * step)
        yield video_BTCHW[:, wanted]
        begin = stop


def cut_at(chunks: Iterator[Tensor], ends: Sequence[int]) -> Iterator[Tensor]:
    """The same frames in chunks up to each of `ends`; what comes after the last is left out."""
    frames, begin = _Frames(chunks), 0
    for end in ends:
        yield frames.take(begin, end)
        begin = end


def halo_of(generator: GeneratorTrunk) -> int:
    """How many frames before and behind a frame it depends on; 0 for a recurrent generator."""
    return len(layers_of(generator, SeparableConvolution))


def statistics_rows(
    generator: GeneratorTrunk, begin: int, end: int, *, total: int, period: int = 1
) -> Tensor:
    """Which of the fixed statistics the frames `begin` to `end` of a video of `total` use, [T].

    Statistics are of every frame of one length. In a video of another length (decided; the paper
    collects them at the length that it generates):

    - a recurrent generator knows nothing of what follows, so each frame uses its own number's. In a
      longer video the last one's are kept, because hidden states settle.
    - convolutions in time tell a video's ends from its middle, so frames use the statistics at
      their distance from the nearer end. In a longer video those in the middle are repeated, as a
      whole `period`: the frames that upsampling makes of one frame differ in their statistics.

    Raises ValueError where statistics are not fixed.
    """
    means = [norm.mean for norm in frame_norms(generator).values()]
    if means[0] is None:
        raise ValueError("only with fixed norm statistics is a chunk of a video what the whole has")
    known, frames_T = len(means[0]), torch.arange(begin, end)
    if not halo_of(generator):
        return frames_T.clamp_max(known - 1)
    from_the_end_T = frames_T + known - total
    if total < known:
        front = min(total, -(-total // (2 * period)) * period)
        return torch.where(frames_T < front, frames_T, from_the_end_T)
    front = min(known // (2 * period) * period, known - period)
    repeated_T = front + (frames_T - front) % period
    middle_T = torch.where(from_the_end_T < front, repeated_T, from_the_end_T)
    return torch.where(frames_T < front, frames_T, middle_T)


class _Frames:
    """Frames of chunks that come one by one; kept from the first that was last asked for."""

    def __init__(self, chunks: Iterator[Tensor]) -> None:
        self._chunks = chunks
        self._first = 0
        self._kept: Tensor | None = None

    def take(self, begin: int, end: int) -> Tensor:
        """The frames `begin` to `end`; those before `begin` are forgotten."""
        while self._kept is None or self._first + self._kept.shape[1] < end:
            chunk_BTCHW = next(self._chunks)
            kept = [] if self._kept is None else [self._kept]
            self._kept = torch.cat([*kept, chunk_BTCHW], dim=1)
        self._kept = self._kept[:, begin - self._first :]
        self._first = begin
        return self._kept[:, : end - begin]


def _continued(chunks: Iterator[Tensor], num_frames: int) -> Iterator[Tensor]:
    """As `repeat_ends`: with the first frame repeated before it and the last one behind it."""
    last = None
    for chunk_BTCHW in chunks:
        if last is None and num_frames:
            yield chunk_BTCHW[:, :1].expand(-1, num_frames, -1, -1, -1)
        last = chunk_BTCHW[:, -1:]
        yield chunk_BTCHW
    if last is not None and num_frames:
        yield last.expand(-1, num_frames, -1, -1, -1)


@contextmanager
def _rows_in_use(generator: GeneratorTrunk, rows_T: Tensor) -> Iterator[None]:
    """Within this context the norms' fixed statistics are these rows of them."""
    norms = list(frame_norms(generator).values())
    whole = [(norm.mean, norm.var) for norm in norms]
    try:
        for norm in norms:
            assert norm.mean is not None
            assert norm.var is not None
            rows = rows_T.to(norm.mean.device)
            norm.mean, norm.var = norm.mean[rows], norm.var[rows]
        yield
    finally:
        for norm, statistics in zip(norms, whole, strict=True):
            norm.mean, norm.var = statistics


@contextmanager
def _going_on(generator: nn.Module, hidden: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Within this context ConvGRUs start from `hidden`; gives the list of what they end with."""
    grus = layers_of(generator, ConvGRU)
    after: list[Tensor] = []

    def keep(_: nn.Module, __: Any, h_BTCHW: Tensor) -> None:
        after.append(h_BTCHW[:, -1].clone())  # a view would keep all of them

    hooks = [gru.register_forward_hook(keep) for gru in grus]
    try:
        for gru, hidden_BCHW in zip(grus, hidden, strict=False):  # there are none yet at the start
            gru.hidden_BCHW = hidden_BCHW
        yield after
    finally:
        for gru, hook in zip(grus, hooks, strict=True):
            gru.hidden_BCHW = None
            hook.remove()
