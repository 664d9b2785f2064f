"""Judging a damaged video: whatever is accepted must be read the same every time."""

import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
from mutants import mutant
from numpy.typing import NDArray

from engine.video.containers import RejectedError, films, open_video
from engine.video.decoding import decode_window
from engine.video.index import VideoEntry, VideoIndex
from engine.video.inspection import inspect_video
from engine.video.keyframes import unpack

_NUM_WINDOWS = 6


def judge_video(seed: int, folder: Path) -> str:
    """Inspect a mutant; if it is accepted, read windows of it and hold them against all of it."""
    name, content, _ = mutant(seed)
    path = folder / name
    path.write_bytes(content)
    try:
        facts = inspect_video(path)
    except RejectedError as rejected:
        return str(rejected)
    status = path.stat()
    entry = VideoEntry(
        **asdict(facts),
        path=name,
        label=None,
        size_bytes=status.st_size,
        modified_ns=status.st_mtime_ns,
    )
    VideoIndex(folder, (), (entry,)).save(folder / "index.jsonl")
    assert VideoIndex.load(folder / "index.jsonl").entries == (entry,)
    frames = _full_decode(path)
    assert facts.num_frames == len(frames), f"num_frames {facts.num_frames}, not {len(frames)}"
    choose = random.Random(seed)
    for _ in range(_NUM_WINDOWS):
        stride = choose.choice((1, 1, 2, 5))
        num_frames = min(choose.randint(1, 4), 1 + (len(frames) - 1) // stride)
        span = (num_frames - 1) * stride + 1
        start = choose.randint(0, len(frames) - span)
        for keyframes in (unpack(facts.keyframes), None):
            window = decode_window(
                path,
                start_frame=start,
                num_frames=num_frames,
                frame_stride=stride,
                video_frames=facts.num_frames,
                keyframes=keyframes,
            )
            assert np.array_equal(window, frames[start : start + span : stride]), (
                f"{num_frames} frames from {start} on, every {stride}th, are others "
                f"{'without' if keyframes is None else 'with'} the table of keyframes"
            )
    return ""


def _full_decode(path: Path) -> list[NDArray[np.uint8]]:
    """Every frame of the video from first to last, by PyAV with its defaults."""
    with open_video(path) as container:
        best, candidates = container.streams.best("video"), films(container)
        stream = best if best in candidates else candidates[0]
        stream.thread_count = 1  # with several, AV1's decoder refuses more than with one
        return [
            frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
            for frame in container.decode(stream)
        ]
