"""ClipLoader: an endless, seeded, sharded stream of training clips with an exact position.

Shapes: B batch, T frames, C = 3 channels (RGB), H x W pixels.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.errors import UserError
from engine.transfers import HeldUntilRead, to_device
from engine.video.decoder_choice import NAMES, choose_decoder, open_stream
from engine.video.index import VideoIndex
from engine.video.sampler import ClipRequest, ClipSampler, batch_numbers
from engine.video.streams import (
    ClipStream,
    DecodedClips,
    FailedFileError,
    IndexedFiles,
    StreamSettings,
)
from engine.views import nearest_view

# Where nine of ten videos are broken, one replacement in 800 clips is not found among so many.
_MOST_TRIED = 64


class LoadedClips(NamedTuple):
    """A batch: video_BTCHW float32 in [-1, 1], physically [B, T, H, W, C]; labels_B int64."""

    video_BTCHW: Tensor
    labels_B: Tensor


@dataclass
class ClipFailures:
    """The files of which no clip could be read, and the clips that others replaced."""

    problems: dict[str, str] = field(default_factory=dict)
    """What is wrong with each file, by its path in the index."""
    num_replaced: int = 0


class ClipLoader:
    """Clips of `num_frames` frames, every `frame_stride`-th, from the videos of an index.

    A clip is decoded, its shorter side resized to `resolution` (antialiased bilinear), cropped to
    a square, perhaps mirrored, and then seen through the nearest-neighbour view f at
    `view_resolution`: all stages train on views of the same pixels. Values are u8 / 127.5 - 1.

    `batch_size` is this rank's; clip k of the sampler belongs to rank k % world_size. Labels are
    zeros when the index has no classes. `next(loader)` never ends.

    `decoder` "auto" takes the fastest that decodes every video, its order and its colours included:
    DALI on a GPU, else PyAV. It never leaves a video out for speed, since that would change the
    data set between machines: five yuv444p clips among 400 000 bring all of them to the CPU.
    `description` then counts them and names one, for the user to re-encode them or take them out.

    With `replace_failed`, a clip whose file can no longer be read is replaced by a clip of a video
    that depends on the clip's number alone, and the one after that where that one cannot be read
    either. So a clip is the same on every run, rank and resumption that finds the same files
    broken; `take_failures` tells which are. Where nothing can be read any more, a clip that was
    read before is repeated, so that the ranks can end their step together; `failure` is then why.

    Raises UserError when no video is long enough, when the decoder asked for cannot run, and, in
    `next`, naming the file, when one cannot be decoded and nothing replaces it. Raises ValueError
    for sizes without a nearest-neighbour view.
    """

    def __init__(
        self,
        index: VideoIndex,
        *,
        num_frames: int,
        frame_stride: int,
        resolution: int,
        view_resolution: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        random_crop: bool = True,
        horizontal_flip: bool = False,
        decoder: str = "auto",
        device: torch.device | None = None,
        num_threads: int = 2,
        replace_failed: bool = False,
    ) -> None:
        if resolution % view_resolution:
            raise ValueError(f"no nearest view of {resolution} pixels at {view_resolution}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}")
        self._index = index
        self._device = device or torch.device("cpu")
        self._resolution, self._view_resolution = resolution, view_resolution
        self._rank, self._world_size = rank, world_size
        self._batch_size = batch_size
        try:
            self._sampler = ClipSampler(
                [entry.num_frames for entry in index.entries],
                num_frames=num_frames,
                frame_stride=frame_stride,
                seed=seed,
                random_crop=random_crop,
                horizontal_flip=horizontal_flip,
            )
        except ValueError:
            longest = max(entry.num_frames for entry in index.entries)
            raise UserError(
                f"no video in {index.root} is long enough: {num_frames} frames, every "
                f"{frame_stride}th, need {(num_frames - 1) * frame_stride + 1}; the longest has "
                f"{longest}"
            ) from None
        used = self._sampler.usable_videos.tolist()
        self._used = [index.entries[video] for video in used]
        self._decoder, self._why = choose_decoder(decoder, index, used, self._device)
        self._decoder_is_asked_for = decoder != "auto"
        self._stream_settings = StreamSettings(
            batch_size=batch_size,
            num_frames=num_frames,
            frame_stride=frame_stride,
            resolution=resolution,
            device=self._device,
            num_threads=num_threads,
        )
        # Not the number of ranks, nor their batches: clip numbers are global, so that however the
        # clips are shared they go on with the same ones.
        self._identity = {
            "data set": index.fingerprint(),
            "num_frames": num_frames,
            "frame_stride": frame_stride,
            "resolution": resolution,
            "view_resolution": view_resolution,
            "seed": seed,
            "random_crop": random_crop,
            "horizontal_flip": horizontal_flip,
        }
        self._position = 0  # clip numbers below it have been handed out, on all ranks together
        self._replaces = replace_failed
        self._files = IndexedFiles(index, self._replacements)
        self._stream: ClipStream | None = None
        self._held = HeldUntilRead()
        self._spare: tuple[ClipRequest, Tensor] | None = None
        """A clip of the last batch, where clips may be replaced."""
        self._failures = ClipFailures()
        self.failure: UserError | None = None
        """Why this loader cannot go on; None while it can."""

    @property
    def sampler(self) -> ClipSampler:
        """Which clips there are, the same on all ranks."""
        return self._sampler

    @property
    def description(self) -> str:
        """One line for a person: how many clips, of what, decoded by what."""
        codecs = Counter(entry.codec for entry in self._used)
        names = ", ".join(name.upper() for name, _ in codecs.most_common())
        text = f"{len(self._used)} video{'s' if len(self._used) > 1 else ''}"
        if self._index.classes:
            text += f", {len(self._index.classes)} classes"
            if num_unseen := len(self._index.classes) - len({e.label for e in self._used}):
                text += f" ({num_unseen} without a usable video)"
        text += f", {names} via {NAMES[self._decoder]}"
        if self._why:
            text += f", {self._why}"
        if self._sampler.num_too_short:
            text += f"; {self._sampler.num_too_short} videos too short, left out"
        sides = [min(entry.width, entry.height) for entry in self._used]
        if num_small := sum(side < self._resolution for side in sides):
            text += f"; {num_small} smaller than {self._resolution} pixels, enlarged"
        return text

    def __iter__(self) -> "ClipLoader":
        return self

    def __next__(self) -> LoadedClips:
        """The next batch of this rank."""
        decoded = self._decoded()
        for failed in decoded.failures:
            self._failures.problems[self._index.entries[failed.video].path] = failed.problem
        self._failures.num_replaced += decoded.num_replaced
        self._position += self._batch_size * self._world_size
        labels = [self._index.entries[request.video].label or 0 for request in decoded.requests]
        video_BTCHW = self._video(decoded.clips_BTHWC)
        clips = LoadedClips(video_BTCHW, to_device(torch.tensor(labels), self._device))
        # DALI takes back memory that nobody holds, without asking the GPU that reads it.
        self._held.add(decoded.clips_BTHWC)
        return clips

    def take_failures(self) -> ClipFailures:
        """What has failed since this was last asked."""
        taken, self._failures = self._failures, ClipFailures()
        return taken

    def state_dict(self) -> dict[str, Any]:
        """The position, the same on all ranks, and what it is a position in."""
        return {
            "position": self._position,
            "identity": dict(self._identity),
            "decoder": self._decoder,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a position: the next batch is the one that would have come then.

        Raises UserError, naming what differs, when the position is one in another stream of clips.
        Decoders differ by a few grey levels of 255, mostly in colour: "auto" does not go on with
        another one, but a user who asks for one by name does.
        """
        saved = state["identity"]
        for name, value in self._identity.items():
            if saved.get(name) != value:
                shown = f" ({saved.get(name)}, now {value})" if name != "data set" else ""
                raise UserError(
                    f"cannot continue: the checkpoint's {name} differs from this run's{shown}"
                )
        if state["decoder"] != self._decoder and not self._decoder_is_asked_for:
            raise UserError(
                f"cannot continue exactly: the checkpoint's videos were decoded by "
                f"{state['decoder']}, this run's would be by {self._decoder}; choose one with "
                f"--set data.decoder={self._decoder}"
            )
        self.close()
        self._position = state["position"]

    def _decoded(self) -> DecodedClips:
        """The next batch; where nothing can be read any more, the spare clip again and again."""
        if self.failure is None:
            try:
                decoded = self._read()
            except UserError as error:
                if self._spare is None:
                    raise
                self.failure = error
            else:
                if self._replaces:
                    self._spare = decoded.requests[0], decoded.clips_BTHWC[0].clone()
                return decoded
        assert self._spare is not None
        request, clip_THWC = self._spare
        size = self._batch_size
        return DecodedClips([request] * size, torch.stack([clip_THWC] * size), [], size)

    def _read(self) -> DecodedClips:
        """The next batch, with clips of other files where files have failed."""
        while True:
            if self._stream is None:
                batches = self._request_batches(self._position)
                self._stream = open_stream(
                    self._files, batches, self._decoder, self._stream_settings
                )
            try:
                return next(self._stream)
            except FailedFileError as failed:
                self.close()
                if not self._replaces:
                    raise
                # DALI dies of a file that looks as it did. Begun again at the same position, it
                # gets another in its stead.
                self._files.give_up(failed)
            except BaseException:
                self.close()  # `next` may be asked again, and then starts at the same position
                raise

    def _replacements(self, number: int) -> Iterator[ClipRequest]:
        for attempt in range(1, 1 + (_MOST_TRIED if self._replaces else 0)):
            yield self._sampler.replacement(number, attempt)

    def close(self) -> None:
        """Stop decoding; `next` starts it again."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _request_batches(self, position: int) -> Iterator[list[ClipRequest]]:
        while True:
            numbers = batch_numbers(
                position,
                rank=self._rank,
                world_size=self._world_size,
                batch_size=self._batch_size,
            )
            yield [self._sampler.request(number) for number in numbers]
            position += self._batch_size * self._world_size

    def _video(self, clips_BTHWC: Tensor) -> Tensor:
        view_BTCHW = nearest_view(
            clips_BTHWC.permute(0, 1, 4, 2, 3), resolution=self._view_resolution
        )
        # Made dense in [B, T, H, W, C] first: conversion alone would fall back to [B, T, C, H, W].
        view_BTHWC = view_BTCHW.permute(0, 1, 3, 4, 2).contiguous()
        video_BTHWC = view_BTHWC.float().div_(127.5).sub_(1)
        return video_BTHWC.permute(0, 1, 4, 2, 3)
