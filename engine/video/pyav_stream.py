"""Clips decoded by PyAV and cut by PyTorch, in threads: for CPUs, and for whatever NVDEC cannot."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from engine.transfers import to_device
from engine.video.geometry import square_clip
from engine.video.index import VideoIndex
from engine.video.sampler import ClipRequest
from engine.video.streams import PREFETCHED_BATCHES, IndexedFiles, StreamSettings


class PyAVStream:
    """See `engine.video.streams.ClipStream`."""

    def __init__(
        self,
        index: VideoIndex,
        batches: Iterator[list[ClipRequest]],
        settings: StreamSettings,
    ) -> None:
        self._index, self._batches, self._settings = index, batches, settings
        self._files = IndexedFiles(index)
        self._threads = ThreadPoolExecutor(settings.num_threads)
        self._in_flight: deque[tuple[list[int], list[Future[Tensor]]]] = deque()

    def __next__(self) -> tuple[Tensor, Tensor]:
        """The next batch's (numbers, clips)."""
        while len(self._in_flight) <= PREFETCHED_BATCHES:
            requests = next(self._batches)
            clips = [self._threads.submit(self._clip, request) for request in requests]
            self._in_flight.append(([request.number for request in requests], clips))
        numbers, futures = self._in_flight.popleft()
        clips_BTHWC = torch.stack([future.result() for future in futures])
        return torch.tensor(numbers), to_device(clips_BTHWC, self._settings.device)

    def close(self) -> None:
        """Stop decoding."""
        self._threads.shutdown(cancel_futures=True)

    def _clip(self, request: ClipRequest) -> Tensor:
        self._files.check(request.video)
        frames_THWC = self._files.window(
            request.video,
            start_frame=request.start_frame,
            num_frames=self._settings.num_frames,
            frame_stride=self._settings.frame_stride,
        )
        entry = self._index.entries[request.video]
        return square_clip(frames_THWC, entry, request, self._settings.resolution)
