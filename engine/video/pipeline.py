"""The DALI pipeline: clip requests in, uint8 clips of one size out. One definition for CPU and GPU.

    requests -> read file -> decode the window -> resize -> rotate -> crop -> flip
             or (PyAV) decoded windows ---^

Every decoder gives frames as coded: what a file asks a player to stretch or to rotate is stretched
and rotated here. The shorter side is resized to the resolution, and the crop is square.

The requests come from our sampler through `external_source`, so the pipeline has no state that a
checkpoint would have to hold, and DALI's readers, which skip damaged files without a word, are
not used. Clips are [B, T, H, W, C], C = 3 (RGB), H = W = resolution.
"""

import hashlib
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.pytorch import DALIGenericIterator
from torch import Tensor

from engine.errors import UserError
from engine.video.containers import RejectedError
from engine.video.decoding import decode_window
from engine.video.index import VideoEntry, VideoIndex
from engine.video.keyframes import unpack
from engine.video.sampler import ClipRequest

Decoder = Literal["dali-cpu", "dali-gpu", "pyav"]
_DECODE, _READ = "nvidia.dali.fn.decoders.video", "nvidia.dali.fn.io.file.read"
# Batches in preparation ahead of the one in use.
PREFETCHED_BATCHES = 2


def decoded(video: list[Any], decoder: Decoder, num_frames: int, frame_stride: int) -> Any:
    """The graph's node of uint8 frames [T, H, W, C] as coded, from what `external_source` gives.

    `video` is a path and a first frame or, for PyAV, the frames themselves.
    """
    if decoder == "pyav":
        return fn.reshape(video[0], layout="FHWC")  # only names the axes
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
        source, num_outputs=5 + resized + (1 if decoder == "pyav" else 2), batch=True
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


def resized_size(entry: VideoEntry, resolution: int) -> tuple[float, float]:
    """Height and width, not yet rotated, at which the shorter side shown is `resolution` pixels.

    DALI rounds them, and keeps the scale that they mean.
    """
    width, height = entry.width, entry.height
    if entry.rotation in (90, 270):
        width, height = height, width
    shorter = min(width, height)
    return height * resolution / shorter, width * resolution / shorter


class ClipStream:
    """Decoded batches for a stream of request batches, in order; `next` gives (numbers, clips).

    numbers: int64 [B], the clip numbers as they came through the pipeline; clips: uint8
    [B, T, H, W, C] on `device`. Raises UserError that names the file when one cannot be decoded;
    whatever else fails, memory included, is DALI's RuntimeError.
    """

    def __init__(
        self,
        index: VideoIndex,
        batches: Iterator[list[ClipRequest]],
        *,
        batch_size: int,
        num_frames: int,
        frame_stride: int,
        resolution: int,
        decoder: Decoder,
        device: torch.device,
        num_threads: int,
    ) -> None:
        self._index = index
        self._num_frames = num_frames
        self._frame_stride = frame_stride
        self._resolution = resolution
        # To the same size it changes no value, but takes a third of a CPU pipeline's time.
        self._resized = any(
            min(entry.width, entry.height) != resolution or entry.sample_aspect_ratio != "1:1"
            for entry in index.entries
        )
        # Requests whose clips have not come out yet: among them is whatever file fails.
        self._in_flight: deque[list[ClipRequest]] = deque()
        self._batches = batches
        self._same_content: set[int] = set()
        self._threads = ThreadPoolExecutor(num_threads) if decoder == "pyav" else None
        self._decoding: deque[list[Future[NDArray[np.uint8]]]] = deque()
        on_gpu = device.type == "cuda"
        pipeline = _clip_pipeline(
            self._next_decoded if decoder == "pyav" else self._next_files,
            decoder,
            on_gpu,
            num_frames,
            frame_stride,
            resolution,
            self._resized,
            batch_size=batch_size,
            num_threads=num_threads,
            device_id=(device.index or 0) if on_gpu else None,
            prefetch_queue_depth=PREFETCHED_BATCHES,
        )
        self._iterator = DALIGenericIterator(
            pipeline, ["number", "clips"], auto_reset=False, prepare_first_batch=False
        )

    def __next__(self) -> tuple[Tensor, Tensor]:
        """The next batch's (numbers, clips)."""
        try:
            batch = next(self._iterator)[0]
        except RuntimeError as error:
            if not _is_about_a_file(error):
                raise
            raise UserError(self._blame(_reason(error))) from error
        numbers, clips = batch["number"], batch["clips"]
        if clips.shape[1] != self._num_frames:
            raise UserError(self._blame("it gave too few frames"))
        self._in_flight.popleft()
        return numbers.view(-1).cpu(), clips

    def close(self) -> None:
        """Stop decoding."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def _next_files(self) -> tuple:
        """Outputs of external_source for decoders that read the file themselves."""
        requests = self._next_requests()
        paths = [str(self._index.path(request.video)) for request in requests]
        return (
            *self._choices(requests),
            [np.frombuffer(path.encode(), dtype=np.uint8) for path in paths],
            [np.int32(request.start_frame) for request in requests],
        )

    def _next_decoded(self) -> tuple:
        """Outputs of external_source with the frames; one more batch is decoded meanwhile."""
        while len(self._decoding) < 2:
            assert self._threads is not None
            requests = self._next_requests()
            self._decoding.append([self._threads.submit(self._decode, r) for r in requests])
        futures = self._decoding.popleft()
        requests = self._in_flight[-1 - len(self._decoding)]
        return (*self._choices(requests), [future.result() for future in futures])

    def _choices(self, requests: Sequence[ClipRequest]) -> tuple[list, ...]:
        entries = [self._index.entries[request.video] for request in requests]
        sizes = [np.array(resized_size(e, self._resolution), dtype=np.float32) for e in entries]
        return (
            [np.array([request.number], dtype=np.int64) for request in requests],
            [np.float32(entry.rotation) for entry in entries],
            [np.float32(request.crop_x) for request in requests],
            [np.float32(request.crop_y) for request in requests],
            [np.int32(request.flip) for request in requests],
            *([sizes] if self._resized else []),
        )

    def _next_requests(self) -> list[ClipRequest]:
        requests = next(self._batches)
        for request in requests:
            self._check_unchanged(request.video)
        self._in_flight.append(requests)
        return requests

    def _check_unchanged(self, video: int) -> None:
        """Refuse a file that is not the one indexed: what libav makes of it was never judged.

        Size and time tell at once; a copied data set has new times, so there the hash decides.
        """
        if video in self._same_content:
            return
        entry, path = self._index.entries[video], self._index.path(video)
        try:
            status = path.stat()
            same = status.st_size == entry.size_bytes
            if same and status.st_mtime_ns != entry.modified_ns:
                with path.open("rb") as file:
                    same = hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256
                if same:
                    self._same_content.add(video)
        except OSError as error:
            raise UserError(
                f"cannot read {path}: {error.strerror}; run engine/prepare.py again"
            ) from None
        if not same:
            raise UserError(f"{path} has changed since it was indexed; run engine/prepare.py again")

    def _decode(self, request: ClipRequest) -> NDArray[np.uint8]:
        path = self._index.path(request.video)
        try:
            return decode_window(
                path,
                start_frame=request.start_frame,
                num_frames=self._num_frames,
                frame_stride=self._frame_stride,
                video_frames=self._index.entries[request.video].num_frames,
                keyframes=unpack(self._index.entries[request.video].keyframes),
            )
        except RejectedError as rejected:
            raise UserError(
                f"cannot decode {path}: {rejected}; run engine/prepare.py again"
            ) from None

    def _blame(self, reason: str) -> str:
        """Name the file: DALI's message tells the operator and the reason, but not the clip."""
        suspects = sorted({r.video for requests in self._in_flight for r in requests})
        for video in suspects:
            entry, path = self._index.entries[video], self._index.path(video)
            try:
                decode_window(
                    path,
                    start_frame=0,
                    num_frames=entry.num_frames,
                    frame_stride=1,
                    video_frames=entry.num_frames,
                )
            except RejectedError as rejected:
                return f"cannot decode {path}: {rejected}; run engine/prepare.py again"
        names = ", ".join(str(self._index.path(video)) for video in suspects)
        return f"DALI cannot decode one of {names}: {reason}"


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
