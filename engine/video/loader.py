"""ClipLoader: an endless, seeded, sharded stream of training clips with an exact position.

Shapes: B batch, T frames, C = 3 channels (RGB), H x W pixels.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.errors import UserError
from engine.transfers import HeldUntilRead, to_device
from engine.video.decoder_choice import NAMES, choose_decoder, open_stream
from engine.video.index import VideoIndex
from engine.video.sampler import ClipRequest, ClipSampler, batch_numbers
from engine.video.streams import ClipStream, StreamSettings
from engine.views import nearest_view


class LoadedClips(NamedTuple):
    """A batch: video_BTCHW float32 in [-1, 1], physically [B, T, H, W, C]; labels_B int64."""

    video_BTCHW: Tensor
    labels_B: Tensor


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

    Raises UserError when no video is long enough, when the decoder asked for cannot run, and, in
    `next`, naming the file, when one cannot be decoded. Raises ValueError for sizes without a
    nearest-neighbour view.
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
        self._stream: ClipStream | None = None
        self._held = HeldUntilRead()
        self._expected = self._request_batches(0)

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
        if self._stream is None:
            self._expected = self._request_batches(self._position)
            self._stream = open_stream(
                self._index,
                self._request_batches(self._position),
                self._decoder,
                self._stream_settings,
            )
        try:
            numbers, clips_BTHWC = next(self._stream)
        except BaseException:
            self.close()  # `next` may be asked again, and then starts at the same position
            raise
        requests = next(self._expected)
        # DALI works ahead on its own; a lost or reordered batch would show here.
        if numbers.tolist() != [request.number for request in requests]:
            raise RuntimeError(f"expected clip {requests[0].number}, got {numbers.tolist()}")
        self._position += self._batch_size * self._world_size
        labels = [self._index.entries[request.video].label or 0 for request in requests]
        clips = LoadedClips(self._video(clips_BTHWC), to_device(torch.tensor(labels), self._device))
        # DALI takes back memory that nobody holds, without asking the GPU that reads it.
        self._held.add(clips_BTHWC)
        return clips

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
