"""Clips decoded and cut by NVIDIA DALI, in one pipeline for CPU and GPU.

    requests -> read file -> decode the window -> resize -> rotate -> crop -> flip

DALI gives frames as coded: what a file asks a player to stretch or to rotate is stretched and
rotated here. The requests come through `external_source`; DALI's readers, which skip damaged files
without a word, are not used.
"""

import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.pytorch import DALIGenericIterator

from engine.errors import UserError
from engine.video.geometry import resized_size
from engine.video.index import VideoIndex
from engine.video.sampler import ClipRequest
from engine.video.streams import (
    PREFETCHED_BATCHES,
    DecodedClips,
    Decoder,
    FailedFileError,
    IndexedFiles,
    Readable,
    StreamSettings,
)

# Decoders enlarge colour of half the size differently; another range or matrix is 5 to 30 off.
_MOST_LEVELS = 3
_DECODE, _READ = "nvidia.dali.fn.decoders.video", "nvidia.dali.fn.io.file.read"


def decoded(video: list[Any], decoder: Decoder, num_frames: int, frame_stride: int) -> Any:
    """The node of uint8 frames [T, H, W, C] as coded; `video` is a path and a first frame."""
    path, start_frame = video
    return fn.decoders.video(
        # Not mapped into memory: a file that becomes shorter meanwhile would end the process.
        fn.io.file.read(path, dont_use_mmap=True),  # type: ignore[attr-defined]
        device="mixed" if decoder == "dali-gpu" else "cpu",
        start_frame=start_frame,
        sequence_length=num_frames,
        stride=frame_stride,
        pad_mode="none",  # a file that has become shorter is to be noticed, not padded
    )


def trial(index: VideoIndex, decoder: Decoder, device: torch.device) -> str | None:
    """Decode two frames from the middle of every video, and compare them with PyAV's.

    Finds what no table knows: a machine without the decoder's library, sizes that it refuses, a
    range that it takes for another. Returns the first problem, as "cannot decode ...", or None.
    """
    files = IndexedFiles(index)
    for video, entry in enumerate(index.entries):
        path = index.path(video)
        num_frames = min(2, entry.num_frames)
        start = (entry.num_frames - num_frames) // 2
        try:
            files.check(video)
            wanted = files.window(video, start_frame=start, num_frames=num_frames, frame_stride=1)
        except FailedFileError:
            continue  # it says nothing of DALI; whoever loads its clips will find the same
        try:
            got = _decoded_alone(str(path), start, num_frames, decoder, device)
        except RuntimeError as error:
            return f"cannot decode {entry.path}: {_reason(error)}"
        if got.shape != wanted.shape:
            return f"cannot decode {entry.path}: frames of {got.shape}, PyAV's of {wanted.shape}"
        levels = float(np.abs(got.astype(np.int16) - wanted).mean())
        if levels > _MOST_LEVELS:
            return f"cannot decode {entry.path}: it is {levels:.0f} levels off what PyAV gives"
    return None


def _decoded_alone(
    path: str, start: int, num_frames: int, decoder: Decoder, device: torch.device
) -> NDArray[np.uint8]:
    @pipeline_def
    def frames() -> Any:
        video = [np.frombuffer(path.encode(), np.uint8), np.int32(start)]
        file, first = (types.Constant(each, device="cpu") for each in video)
        return decoded([file, first], decoder, num_frames, 1)

    on_gpu = device.type == "cuda"
    pipeline = frames(
        batch_size=1, num_threads=1, device_id=(device.index or 0) if on_gpu else None
    )
    (batch,) = pipeline.run()
    return np.asarray((batch.as_cpu() if on_gpu else batch)[0])


@pipeline_def
def _clip_pipeline(
    source: Callable[[], tuple],
    decoder: Decoder,
    on_gpu: bool,
    num_frames: int,
    frame_stride: int,
    resolution: int,
    resized: bool,
) -> Any:
    number, rotation, crop_x, crop_y, flip, *more = fn.external_source(
        source, num_outputs=7 + resized, batch=True
    )
    size, video = (more[0], more[1:]) if resized else (None, more)
    frames: Any = decoded(video, decoder, num_frames, frame_stride)
    if on_gpu:
        frames = frames.gpu()
    if resized:
        frames = fn.resize(
            frames,
            size=size,
            interp_type=types.DALIInterpType.INTERP_LINEAR,
            antialias=True,
        )
    # By quarter turns, 0 included, the nearest pixel is the pixel itself.
    frames = fn.rotate(frames, angle=rotation, interp_type=types.DALIInterpType.INTERP_NN)
    frames = fn.crop(frames, crop=(resolution, resolution), crop_pos_x=crop_x, crop_pos_y=crop_y)
    return number, fn.flip(frames, horizontal=flip)


class DaliStream:
    """See `engine.video.streams.ClipStream`. What fails but for a file is DALI's RuntimeError."""

    def __init__(
        self,
        files: IndexedFiles,
        batches: Iterator[list[ClipRequest]],
        decoder: Decoder,
        settings: StreamSettings,
    ) -> None:
        self._index, self._files = files.index, files
        self._batches, self._settings = batches, settings
        # What was asked for and has not come out yet: among it is whatever file fails.
        self._in_flight: deque[list[Readable[None]]] = deque()
        # To the same size it changes no value, but takes a third of a CPU pipeline's time.
        self._resized = any(
            min(entry.width, entry.height) != settings.resolution
            or entry.sample_aspect_ratio != "1:1"
            for entry in self._index.entries
        )
        on_gpu = settings.device.type == "cuda"
        pipeline = _clip_pipeline(
            self._next_files,
            decoder,
            on_gpu,
            settings.num_frames,
            settings.frame_stride,
            settings.resolution,
            self._resized,
            batch_size=settings.batch_size,
            num_threads=settings.num_threads,
            device_id=(settings.device.index or 0) if on_gpu else None,
            prefetch_queue_depth=PREFETCHED_BATCHES,
        )
        self._iterator = DALIGenericIterator(
            pipeline, ["number", "clips"], auto_reset=False, prepare_first_batch=False
        )

    def __next__(self) -> DecodedClips:
        """The next batch.

        A file that fails in DALI itself, unnoticed before, is a FailedFileError.
        """
        try:
            batch = next(self._iterator)[0]
        except RuntimeError as error:
            if not _is_about_a_file(error):
                raise
            raise self._blame(_reason(error)) from error
        numbers, clips_BTHWC = batch["number"].view(-1).tolist(), batch["clips"]
        if clips_BTHWC.shape[1] != self._settings.num_frames:
            raise self._blame("it gave too few frames")
        found = self._in_flight.popleft()
        # DALI works ahead on its own; a lost or reordered batch would show here.
        if numbers != [each.request.number for each in found]:
            raise RuntimeError(f"expected clip {found[0].request.number}, got {numbers}")
        return DecodedClips.of(found, clips_BTHWC)

    def close(self) -> None:
        """Nothing to stop: DALI's threads end with it."""

    def _next_files(self) -> tuple[list, ...]:
        """What `external_source` asks for: choices, then paths and first frames."""
        requests = next(self._batches)
        found = [self._files.first_readable(request, self._check) for request in requests]
        self._in_flight.append(found)
        requests = [each.request for each in found]
        paths = [str(self._index.path(request.video)) for request in requests]
        return (
            *self._choices(requests),
            [np.frombuffer(path.encode(), dtype=np.uint8) for path in paths],
            [np.int32(request.start_frame) for request in requests],
        )

    def _check(self, request: ClipRequest) -> None:
        self._files.check(request.video)

    def _choices(self, requests: Sequence[ClipRequest]) -> tuple[list, ...]:
        entries = [self._index.entries[request.video] for request in requests]
        resolution = self._settings.resolution
        sizes = [np.array(resized_size(entry, resolution), np.float32) for entry in entries]
        return (
            [np.array([request.number], dtype=np.int64) for request in requests],
            [np.float32(entry.rotation) for entry in entries],
            [np.float32(request.crop_x) for request in requests],
            [np.float32(request.crop_y) for request in requests],
            [np.int32(request.flip) for request in requests],
            *([sizes] if self._resized else []),
        )

    def _blame(self, reason: str) -> UserError:
        """Name the file: DALI's message tells the operator and the reason, but not the clip."""
        suspects = sorted({each.request.video for batch in self._in_flight for each in batch})
        for video in suspects:
            num_frames = self._index.entries[video].num_frames
            try:
                self._files.window(video, start_frame=0, num_frames=num_frames, frame_stride=1)
            except FailedFileError as failed:
                return failed
        names = ", ".join(str(self._index.path(video)) for video in suspects)
        return UserError(f"DALI cannot decode one of {names}: {reason}")


def _is_about_a_file(error: RuntimeError) -> bool:
    """DALI raises RuntimeError for all that goes wrong; only some of it can be a video's fault."""
    text = str(error)
    if "IsDenseTensor()" in text:  # a file has become shorter: its clip has fewer frames
        return True
    raised_by_decoder = f"operator `{_DECODE}`" in text or f"operator `{_READ}`" in text
    return raised_by_decoder and not re.search("out.of.memory|alloc", text, re.IGNORECASE)


def _reason(error: RuntimeError) -> str:
    """The first line of what DALI encountered, without the operator and its traceback."""
    return str(error).rpartition("encountered:")[2].strip().partition("\n")[0]
