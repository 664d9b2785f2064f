"""Clips decoded by PyAV and cut by PyTorch, in threads: for CPUs, and for whatever NVDEC cannot."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from engine.transfers import to_device
from engine.video.geometry import square_clip
from engine.video.sampler import ClipRequest
from engine.video.streams import (
    PREFETCHED_BATCHES,
    DecodedClips,
    IndexedFiles,
    Readable,
    StreamSettings,
)


class PyAVStream:
    """See `engine.video.streams.ClipStream`."""

    def __init__(
        self,
        files: IndexedFiles,
        batches: Iterator[list[ClipRequest]],
        settings: StreamSettings,
    ) -> None:
        self._files, self._batches, self._settings = files, batches, settings
        self._threads = ThreadPoolExecutor(settings.num_threads)
        self._in_flight: deque[list[Future[Readable[Tensor]]]] = deque()

    def __next__(self) -> DecodedClips:
        """The next batch."""
        while len(self._in_flight) <= PREFETCHED_BATCHES:
            requests = next(self._batches)
            self._in_flight.append([self._threads.submit(self._read, each) for each in requests])
        found = [future.result() for future in self._in_flight.popleft()]
        clips_BTHWC = torch.stack([each.read for each in found])
        return DecodedClips.of(found, to_device(clips_BTHWC, self._settings.device))

    def close(self) -> None:
        """Stop decoding."""
        self._threads.shutdown(cancel_futures=True)

    def _read(self, request: ClipRequest) -> Readable[Tensor]:
        return self._files.first_readable(request, self._clip)

    def _clip(self, request: ClipRequest) -> Tensor:
        self._files.check(request.video)
        frames_THWC = self._files.window(
            request.video,
            start_frame=request.start_frame,
            num_frames=self._settings.num_frames,
            frame_stride=self._settings.frame_stride,
        )
        entry = self._files.index.entries[request.video]
        return square_clip(frames_THWC, entry, request, self._settings.resolution)
