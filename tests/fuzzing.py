"""Judging mutants in a process of its own, so that one may crash or hang and the caller goes on."""

import contextlib
import multiprocessing
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import av.logging
import pytest

MOST_SECONDS = 5.0
"""For one file. A sound one takes a hundredth of that."""
MOST_MIB = 4096
"""In use for one file: libav makes no index of packets that is larger."""
_MOST_START_SECONDS = 120.0
_ADDRESSABLE_MIB = 2 * MOST_MIB


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


def _nothing() -> None:
    pass


def seeds_of(config: pytest.Config, default: int) -> range:
    """Those that the option `--mutants` names, or the first `default` ones."""
    first, _, last = (config.getoption("mutants") or str(default)).rpartition(":")
    return range(int(first or 0), int(last))


def verdicts(
    seeds: Sequence[int],
    judge: Judge,
    *,
    prepare: Callable[[], object] = _nothing,
    most_seconds: float = MOST_SECONDS,
    most_mib: int = MOST_MIB,
) -> Iterator[Verdict]:
    """A verdict of each seed, in order; one that crashes the judging process, or hangs, is told.

    The process calls `prepare` before its first judgement, with no limit of time.
    """
    worker: _Worker | None = None
    try:
        for place, seed in enumerate(seeds):
            worker = worker or _Worker(seeds[place:], judge, prepare)
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

    def __init__(self, seeds: Sequence[int], judge: Judge, prepare: Callable[[], object]) -> None:
        # Spawned: pytest's process may hold threads.
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(
            target=_work, args=(theirs, seeds, judge, prepare)
        )
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


def _work(
    connection: Connection, seeds: Sequence[int], judge: Judge, prepare: Callable[[], object]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    prepare()
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
