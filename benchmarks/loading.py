"""Parts of the loader, each as an endless source of batches, and a video to load.

- `decode`: the windows' frames, as coded and with nothing done to them.
- `pipeline`: these, resized, cropped and flipped; on a GPU also brought there. uint8.
- `loader`: what training gets: float, at the stage's resolution, with labels.
- `transfer`: on a GPU, the decoded frames copied there from pinned memory, nothing else.
"""

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import torch
from av.video.stream import VideoStream
from numpy.typing import NDArray

from engine.configuration import Config
from engine.trainer.networks import StageBuilder
from engine.trainer.ranks import Ranks
from engine.video.dataset import describe
from engine.video.decoder_choice import open_stream
from engine.video.index import VideoIndex
from engine.video.indexing import build_index
from engine.video.loader import ClipLoader
from engine.video.procedural import FPS, render_clip
from engine.video.sampler import ClipRequest
from engine.video.streams import PREFETCHED_BATCHES, Decoder, IndexedFiles, StreamSettings

Pull = Callable[[], object]
BATCHES_PER_ROUND = 2


class Source:
    """What is loaded, and how: the clips that training would get, in the same order."""

    def __init__(
        self,
        config: Config,
        stage_number: int,
        index: VideoIndex,
        decoder: Decoder,
        num_threads: int,
        device: torch.device,
    ) -> None:
        self.index, self.decoder, self.device = index, decoder, device
        self.stage = config.stages[stage_number]
        self.batch_size = self.stage.training.samples_per_pass
        data = config.data.model_copy(update={"decoder": decoder, "num_threads": num_threads})
        config = config.model_copy(update={"data": data})
        ranks = Ranks(rank=0, world_size=1, local_rank=0, device=device)
        self._builder = StageBuilder(config, stage_number, ranks, describe(index, data))
        self.settings = StreamSettings(
            batch_size=self.batch_size,
            num_frames=self.stage.num_frames,
            frame_stride=self.stage.frame_stride,
            resolution=config.resolution,
            device=device,
            num_threads=num_threads,
        )

    def loader(self) -> ClipLoader:
        """As engine/train.py has it, for one rank."""
        return self._builder.loader(self.index)

    def requests(self) -> Iterator[list[ClipRequest]]:
        """What a rank asks for, batch by batch, without end."""
        sampler = self.loader().sampler
        for first in itertools.count(0, self.batch_size):
            yield [sampler.request(first + k) for k in range(self.batch_size)]

    def finished(self, pull: Pull) -> Pull:
        """The same, and what it started on a GPU is done."""

        def run() -> object:
            batch = pull()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            return batch

        return run


def pace(
    pull: Pull, batch_size: int, seconds: float, least_rounds: int
) -> tuple[list[float], float]:
    """Pull as fast as batches come, for about `seconds` and at least so many rounds.

    Returns the wall time per clip of every round, and this process's CPU time per clip, all threads
    and rounds together. What was made ahead is pulled before the clock starts: from then on batches
    come as fast as they are made.
    """
    for _ in range(2 * PREFETCHED_BATCHES):
        pull()
    rounds: list[float] = []
    cpu_start = time.process_time()
    while len(rounds) < least_rounds or sum(rounds) < seconds:
        start = time.perf_counter()
        for _ in range(BATCHES_PER_ROUND):
            pull()
        rounds.append(time.perf_counter() - start)
    clips = BATCHES_PER_ROUND * batch_size
    cpu_seconds = (time.process_time() - cpu_start) / (len(rounds) * clips)
    return [taken / clips for taken in rounds], cpu_seconds


@contextmanager
def decode(source: Source) -> Iterator[Pull]:
    """Decoding alone."""
    if source.decoder != "pyav":
        yield source.finished(_dali_decoding(source))
        return
    stage, requests = source.stage, source.requests()
    files = IndexedFiles(source.index)
    spacing = {"num_frames": stage.num_frames, "frame_stride": stage.frame_stride}
    in_flight: deque[list[Future[NDArray[np.uint8]]]] = deque()
    with ThreadPoolExecutor(source.settings.num_threads) as pool:

        def window(request: ClipRequest) -> Future[NDArray[np.uint8]]:
            start = request.start_frame
            return pool.submit(files.window, request.video, start_frame=start, **spacing)

        def windows() -> list[NDArray[np.uint8]]:
            while len(in_flight) < 2:  # so that no thread waits for a batch
                in_flight.append([window(each) for each in next(requests)])
            return [future.result() for future in in_flight.popleft()]

        yield windows


def _dali_decoding(source: Source) -> Pull:
    from nvidia.dali import fn, pipeline_def

    from engine.video.dali_stream import decoded

    stage, requests = source.stage, source.requests()

    def paths_and_frames() -> tuple[list[Any], list[Any]]:
        batch = next(requests)
        paths = [str(source.index.path(request.video)).encode() for request in batch]
        return (
            [np.frombuffer(path, dtype=np.uint8) for path in paths],
            [np.int32(request.start_frame) for request in batch],
        )

    @pipeline_def
    def decode_pipeline() -> Any:
        video = fn.external_source(paths_and_frames, num_outputs=2, batch=True)
        return decoded(cast(list[Any], video), source.decoder, stage.num_frames, stage.frame_stride)

    decoding = decode_pipeline(
        batch_size=source.batch_size,
        num_threads=source.settings.num_threads,
        device_id=(source.device.index or 0) if source.decoder == "dali-gpu" else None,
        prefetch_queue_depth=PREFETCHED_BATCHES,
    )
    decoding.build()
    pull: Pull = decoding.run
    return pull


@contextmanager
def pipeline(source: Source) -> Iterator[Pull]:
    """The whole pipeline, uint8 clips at the configuration's resolution."""
    files = IndexedFiles(source.index)
    stream = open_stream(files, source.requests(), source.decoder, source.settings)
    with closing(stream):
        yield source.finished(partial(next, stream))


@contextmanager
def loader(source: Source) -> Iterator[Pull]:
    """What engine/train.py reads from."""
    with closing(source.loader()) as clips:
        yield source.finished(partial(next, clips))


@contextmanager
def transfer(source: Source) -> Iterator[Pull]:
    """A batch of decoded frames from pinned memory to the GPU."""
    entry = source.index.entries[0]
    shape = source.batch_size, source.stage.num_frames, entry.height, entry.width, 3
    frames = torch.zeros(shape, dtype=torch.uint8).pin_memory()
    yield source.finished(partial(frames.to, source.device, non_blocking=True))


PARTS = {"decode": decode, "pipeline": pipeline, "loader": loader}


# ----------------------------------------------------------------------------------- videos

# suffix, encoder, pixel format, options. H.264's keyframes are where x264 puts them, up to 250
# frames apart, as in videos from the web; VP9's frequent, as in videos prepared for training.
ENCODINGS = {
    "mjpeg": ("mkv", "mjpeg", "yuvj420p", {"qmin": "3", "qmax": "3"}),
    "vp9": ("webm", "libvpx-vp9", "yuv420p",
            {"crf": "30", "b": "0", "deadline": "realtime", "cpu-used": "8", "g": "16"}),
    "h264": ("mp4", "libx264", "yuv420p", {"preset": "veryfast", "crf": "23"}),
}  # fmt: skip


def write_video(folder: Path, codec: str, width: int, height: int, num_frames: int) -> VideoIndex:
    """One video of one class, and its index.

    Moving shapes with grain on top: without it they would compress, and decode, unlike real ones.
    """
    suffix, encoder, pixel_format, options = ENCODINGS[codec]
    (folder / "class").mkdir(parents=True)
    random = np.random.default_rng(0)
    # Rendered half as large: 250 frames of 340x340 would take numpy a gigabyte.
    half = render_clip(0, 0, 0, num_frames, -(-max(width, height) // 2))
    with av.open(str(folder / "class" / f"video.{suffix}"), "w") as container:
        stream = container.add_stream(encoder, rate=FPS, options={**options, "threads": "1"})
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        for small in half:
            frame = small.repeat(2, axis=0).repeat(2, axis=1)[:height, :width]
            frame = (frame + random.normal(0, 4, frame.shape)).clip(0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return build_index(folder, folder / "index.jsonl", num_workers=0, progress=False)[0]
