"""Recorders of a step's windows: one counts operators, one makes torch.profiler's traces."""

from pathlib import Path

import torch
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile, schedule

from engine.durable_files import writing
from engine.trainer.profiling.counts import OperatorCounter
from engine.trainer.profiling.places import Range


class CountRecorder:
    """Counts the operators; on a GPU it also records allocations, since stacks cost host time."""

    def __init__(self, device: torch.device, folder: Path, *, num_windows: int) -> None:
        """`folder` gets memory.pickle, or memory-1.pickle and so on for several windows."""
        self.counter = OperatorCounter()
        self._on_gpu = device.type == "cuda"
        numbers = [""] if num_windows == 1 else [f"-{n + 1}" for n in range(num_windows)]
        self._files = iter([folder / f"memory{number}.pickle" for number in numbers])

    def prepare(self) -> None:
        """Nothing needs to be warm."""

    def begin(self) -> None:
        """Count from here on."""
        if self._on_gpu:
            torch.cuda.memory._record_memory_history(stacks="python")
        self.counter.__enter__()

    def enter(self, entered: Range) -> None:
        """What is counted from now on belongs to this range."""
        self.counter.enter(entered)

    def leave(self) -> None:
        """Back to the range around it."""
        self.counter.leave()

    def end(self) -> None:
        """Count no more. A history with a gap cannot be read, so every window has its own."""
        self.counter.__exit__(None, None, None)
        if self._on_gpu:
            file = next(self._files)
            with writing(file.parent):
                file.parent.mkdir(parents=True, exist_ok=True)
                torch.cuda.memory._dump_snapshot(str(file))
            torch.cuda.memory._record_memory_history(enabled=None)


class TraceRecorder:
    """A trace of every window, in `recorded`."""

    def __init__(self, device: torch.device) -> None:
        self.recorded: list[profile] = []
        self._activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)
        self._profiler: profile | None = None
        self._open: list[record_function] = []

    def prepare(self) -> None:
        """Warm up: on a GPU the first events would be late."""
        self._profiler = profile(
            activities=self._activities,
            schedule=schedule(wait=0, warmup=1, active=1, repeat=1),
            profile_memory=True,
        )
        self._profiler.start()

    def begin(self) -> None:
        """Record from here on."""
        assert self._profiler is not None
        self._profiler.step()

    def enter(self, entered: Range) -> None:
        """A range that began before the recording is in no trace, so it is entered again."""
        self._open.append(record_function(entered.label))
        self._open[-1].__enter__()

    def leave(self) -> None:
        """Back to the range around it."""
        self._open.pop().__exit__(None, None, None)

    def end(self) -> None:
        """Record no more."""
        assert self._profiler is not None
        self._profiler.step()
        self.recorded.append(self._profiler)
        self._profiler = None

    def close(self) -> None:
        """Give up what has not come to its end."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None
