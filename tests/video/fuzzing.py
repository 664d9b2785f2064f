"""Judging mutants in a process of its own, so that one may crash or hang and the caller goes on."""

import contextlib
import multiprocessing
import random
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import av.logging
import numpy as np
from mutants import bases, mutant
from numpy.typing import NDArray

from engine.video.containers import RejectedError, films, open_video
from engine.video.decoding import decode_window
from engine.video.index import VideoEntry, VideoIndex
from engine.video.inspection import inspect_video
from engine.video.keyframes import unpack

MOST_SECONDS = 5.0
"""For one file. A sound one takes a hundredth of that."""
MOST_MIB = 4096
"""In use for one file: libav makes no index of packets that is larger."""
_MOST_START_SECONDS = 120.0
_ADDRESSABLE_MIB = 2 * MOST_MIB
_NUM_WINDOWS = 6


@dataclass(frozen=True)
class Verdict:
    """What became of one mutant."""

    seed: int
    seconds: float
    mib: int = 0
    """Memory that was in use at most, beyond what was before."""
    reason: str = ""
    """Why it was rejected; empty if it was accepted."""
    defect: str = ""
    """What the engine did wrong; empty if nothing."""


Judge = Callable[[int, Path], str]
"""Of a seed and an empty folder: why the mutant is rejected. Raises an exception for a defect."""


def judge_mutant(seed: int, folder: Path) -> str:
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


def verdicts(
    seeds: Sequence[int],
    judge: Judge = judge_mutant,
    *,
    most_seconds: float = MOST_SECONDS,
    most_mib: int = MOST_MIB,
) -> Iterator[Verdict]:
    """A verdict of each seed, in order; one that crashes the judging process, or hangs, is told."""
    worker: _Worker | None = None
    try:
        for place, seed in enumerate(seeds):
            worker = worker or _Worker(seeds[place:], judge)
            before = time.monotonic()
            verdict = worker.next(most_seconds)
            if verdict is None:
                verdict = Verdict(seed, time.monotonic() - before, defect=worker.end())
                worker = None
            assert verdict.seed == seed
            if verdict.mib > most_mib:
                verdict = replace(verdict, defect=f"takes {verdict.mib} MiB")
            yield verdict
    finally:
        if worker is not None:
            worker.end()


class _Worker:
    """A process that judges seeds one after the other."""

    def __init__(self, seeds: Sequence[int], judge: Judge) -> None:
        # Spawned: pytest's process may hold threads.
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(target=_work, args=(theirs, seeds, judge))
        self._process.start()
        theirs.close()
        if not self._ours.poll(_MOST_START_SECONDS):
            raise RuntimeError(f"the judging process did not start: {self.end()}")
        self._ours.recv()

    def next(self, most_seconds: float) -> Verdict | None:
        """None where the process ends, or takes too long."""
        try:
            if self._ours.poll(most_seconds):
                verdict: Verdict = self._ours.recv()
                return verdict
        except (EOFError, ConnectionError):
            self._process.join(30)  # its memory may have to be written to a core first
        return None

    def end(self) -> str:
        """Make sure that the process is gone. How it ended, if by itself."""
        code = self._process.exitcode
        if code is None:
            self._process.kill()
            self._process.join()
        self._ours.close()
        if code is None:
            return "takes too long"
        return f"ends the process: {signal.Signals(-code).name if code < 0 else code}"


def _work(connection: Connection, seeds: Sequence[int], judge: Judge) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    if judge is judge_mutant:
        bases()
    # What is beyond the test's own limit must not take the machine's memory first.
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESSABLE_MIB << 20,) * 2)
    connection.send("ready")
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(BrokenPipeError):
            connection.send(_verdict(seed, Path(folder), judge))


def _verdict(seed: int, folder: Path, judge: Judge) -> Verdict:
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
    before_kib, before = _peak_kib(), time.monotonic()
    reason = defect = ""
    try:
        reason = judge(seed, folder)
    except Exception as error:
        defect = f"{type(error).__name__}: {error}"
    seconds, more_kib = time.monotonic() - before, _peak_kib() - before_kib
    if av.logging.get_level() is not None:
        defect = defect or "leaves libav's messages switched on"
    return Verdict(seed, seconds, more_kib >> 10, reason, defect)


def _peak_kib() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
