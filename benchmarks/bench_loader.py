"""Clips per second from the loader against what a step consumes, and which part takes the time.

Files come from the page cache: disks and networks are not measured.
"""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import loading
from benchmarks.loading import Source, pace
from benchmarks.results import Feed
from benchmarks.session import Session
from benchmarks.setups import CONFIGS, KINETICS
from benchmarks.timing import sample, spread
from benchmarks.trainers import make_trainer
from engine import prepare
from engine.configuration import Config, load_config
from engine.trainer.ranks import Ranks
from engine.video.dataset import open_dataset
from engine.video.index import VideoIndex
from engine.video.streams import Decoder

# Stage 2's aim on an H100, from which its two D updates per sample take a clip each.
AIMED_SECONDS_PER_SAMPLE = 0.017
CLIPS_PER_BATCH = ("training.micro_batch=4",)
Feeding = Callable[..., None]
WHERE = pytest.mark.parametrize("where", ["cpu", "gpu"])


COPIES = "copies of "
KINETICS_VIDEOS = (
    *("mjpeg 128x128", "vp9 128x128", "h264 128x128", "h264 340x256"),
    f"{COPIES}h264 340x256",
)
"""What is made for the measurement: codec and size; copies as engine/prepare.py --transcode makes
them."""
NUM_FRAMES = 250  # ten seconds, as long as Kinetics' are


@pytest.fixture
def decoder(session: Session, where: str) -> Decoder:
    """What "auto" takes: NVDEC on a GPU, else PyAV. Skips the test where there is no GPU."""
    if where == "gpu" and session.device.type != "cuda":
        pytest.skip("NVDEC needs a GPU")
    return "dali-gpu" if where == "gpu" else "pyav"


@pytest.fixture
def feed(session: Session, request: pytest.FixtureRequest) -> Feeding:
    """Measures every part with one decoding thread and with two."""

    def run(
        config: Config,
        index: VideoIndex,
        decoder: Decoder,
        needed_per_s: float | None = None,
        origin: str = "",
    ) -> None:
        stage, entry = config.stages[2], index.entries[0]
        aim = stage.training.discriminator_steps / AIMED_SECONDS_PER_SAMPLE
        parts: dict[str, Any] = dict(loading.PARTS)
        if session.device.type == "cuda" and decoder != "dali-gpu":
            parts["transfer"] = loading.transfer
        feeds = []  # a case counts only as a whole
        for num_threads, (name, part) in product((1, 2)[: 2 - session.quick], parts.items()):
            source = Source(config, 2, index, decoder, num_threads, session.device)
            limits = session.seconds_per_case, session.least_rounds
            with part(source) as pull:
                seconds, cpu_seconds = pace(pull, source.batch_size, *limits)
            found = Feed(
                case=request.node.name.removeprefix("test_"),
                clips=f"{config.name} stage 2, {stage.num_frames} of {stage.num_source_frames} "
                f"frames of {entry.codec} {entry.width}x{entry.height}{origin}",
                decoder=decoder,
                num_threads=num_threads,
                part=name,
                batch_size=source.batch_size,
                rounds=len(seconds),
                seconds=spread(seconds),
                cpu_seconds=cpu_seconds,
                needed_per_s=aim if needed_per_s is None else needed_per_s,
            )
            feeds.append(found)
        session.results.feeds.extend(feeds)

    return run


@WHERE
def test_loader_sample(
    session: Session, feed: Feeding, ranks: Ranks, tmp_path: Path, decoder: Decoder
) -> None:
    """The sample data set for stage 2, against the real step on this machine."""
    few = "data.procedural.num_clips=16"
    config = load_config(CONFIGS / "sample.yaml", [f"data.path={tmp_path / 'sample'}", few])
    index = open_dataset(config.data, make=True, say=lambda line: None)
    torch.manual_seed(0)
    trainer = make_trainer(config, 2, ranks)
    trainer.train_step()
    rounds = 1 if session.quick else 3
    steps = sample(trainer.train_step, session.device, 0, least=rounds, most=rounds)
    training = config.stages[2].training
    needed = training.discriminator_steps * training.global_batch / spread(steps).median
    feed(config, index, decoder, needed)


@WHERE
@pytest.mark.parametrize("video", KINETICS_VIDEOS)
def test_loader_kinetics(
    session: Session, feed: Feeding, tmp_path: Path, video: str, decoder: Decoder
) -> None:
    """128x128/12 clips for stage 2, against its aim on an H100."""
    if session.quick and video != "h264 128x128":
        pytest.skip("--quick loads H.264 of 128x128 only")
    config, origin = load_config(KINETICS, CLIPS_PER_BATCH), ""
    videos, copies = tmp_path / "videos", tmp_path / "small.jsonl"
    codec, size = video.removeprefix(COPIES).split()
    width, height = map(int, size.split("x"))
    index = loading.write_video(videos, codec, width, height, NUM_FRAMES)
    if video.startswith(COPIES):
        small = ["--transcode", tmp_path / "small", "--size", config.resolution]
        prepare.main([str(word) for word in (videos, *small, "--out", copies, "--workers", 1)])
        index, origin = VideoIndex.load(copies), f", {video}"
    feed(config, index, decoder, origin=origin)


@pytest.mark.parametrize("num_frames", [300, 15_000])
def test_loader_length(session: Session, feed: Feeding, tmp_path: Path, num_frames: int) -> None:
    """What a window costs of a video of 12 seconds and of one of ten minutes."""
    if session.quick:
        pytest.skip("--quick loads short videos only")
    index = loading.write_video(tmp_path / "videos", "vp9", 128, 128, num_frames)
    feed(load_config(KINETICS, CLIPS_PER_BATCH), index, "pyav")
