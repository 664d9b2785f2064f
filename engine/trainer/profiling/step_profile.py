"""`train.py --profile`: looks at a few training steps of rank 0, then training goes on.

Under OUT/stageN/profile/ it leaves

- `trace.json.gz`: torch.profiler's trace, for Perfetto (https://ui.perfetto.dev);
- `modules.md` and `modules.json`: time, FLOPs, bytes and HFU of every part; see module_table.py;
- `memory.pickle` on a GPU: every allocation of one step with its Python stack, for
  https://pytorch.org/memory_viz. A CPU has no such record; what each part holds at the peak of
  memory stands in `modules.md` on both.

Where many micro-batches are accumulated, a profile looks at some of them, in windows (windows.py),
and scales the tables to the step, so that a trace does not grow with the batch. Every window has
its own `memory-1.pickle` and so on.

The steps are ordinary ones: what they compute, and what the ranks exchange, is the same without
a profile. The other ranks wait for rank 0 where they need it.
"""

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

from engine.durable_files import writing
from engine.trainer.profiling import timeline
from engine.trainer.profiling.module_table import StepCosts
from engine.trainer.profiling.places import Place
from engine.trainer.profiling.recorders import CountRecorder, TraceRecorder
from engine.trainer.profiling.timeline import Peak
from engine.trainer.profiling.trace_file import TraceFile, exported
from engine.trainer.profiling.windows import Windows
from engine.trainer.step import Trainer

FOLDER = "profile"
# Before the steps that are timed: one that is slow because it is the first, one to compare with,
# one that is counted, and one with which the profiler warms up.
_COLD, _PLAIN, _COUNTED, _WARM_UP = range(4)
NUM_STEPS_BEFORE = 4


class StepProfile:
    """Stands in for `Trainer.train_step` until the profile is done, and after it."""

    def __init__(
        self, trainer: Trainer, folder: Path, *, num_steps: int, title: str, dtype: torch.dtype
    ) -> None:
        self.folder = folder / FOLDER
        self._trainer, self._num_steps, self._title, self._dtype = trainer, num_steps, title, dtype
        self._device = trainer.g_engine.device
        self._windows = Windows(trainer)
        self._counts = CountRecorder(self._device, self.folder, num_windows=self._windows.number)
        self._traces = TraceRecorder(self._device)
        self._plain_seconds = 0.0
        self._step = -1

    def train_step(self, goes_on: Callable[[], bool] = lambda: True) -> dict[str, float]:
        """The next step, looked at if it is its turn.

        `goes_on` is asked as without a profile: the ranks that have none ask too, and the question
        is collective. A no ends the step, and a profile that is not at its end is to be closed.
        """
        self._step += 1
        if self._step == _PLAIN:
            began = time.perf_counter()
            measures = self._trainer.train_step(goes_on)  # ends by reading them off the device
            self._plain_seconds = time.perf_counter() - began
            return measures
        if self._step == _COUNTED:
            return self._windows.show(self._counts, goes_on)
        if _WARM_UP <= self._step < NUM_STEPS_BEFORE + self._num_steps:
            return self._traced_step(goes_on)
        return self._trainer.train_step(goes_on)

    def close(self) -> None:
        """Give up a profile that has not come to its end."""
        self._traces.close()

    def _traced_step(self, goes_on: Callable[[], bool]) -> dict[str, float]:
        if self._step == _WARM_UP:
            self._traces.prepare()
        measures = self._windows.show(self._traces, goes_on)
        if self._step == _WARM_UP:
            self._traces.recorded.clear()
        if self._step + 1 < NUM_STEPS_BEFORE + self._num_steps:
            self._traces.prepare()
        else:
            self._write()
        return measures

    def _write(self) -> None:
        device_type = self._device.type
        seconds: dict[Place, float] = defaultdict(float)
        peak = Peak()
        file = self.folder / "trace.json.gz"
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with TraceFile(file) as trace_file:
                while self._traces.recorded:  # each is let go when it is read
                    trace = exported(self._traces.recorded.pop(0), file)
                    trace_file.add(trace)
                    for place, spent in timeline.times(trace, device_type).items():
                        seconds[place] += spent
                    peak = max(peak, timeline.peak(trace, device_type), key=lambda p: p.num_bytes)
        costs = StepCosts.of(
            seconds,
            self._counts.counter.counted,
            weights=self._windows.weights,
            num_steps=self._num_steps,
            num_micro_batches=self._trainer.num_micro_batches,
            num_looked_at=self._windows.num_looked_at,
            device_type=device_type,
            plain_step_seconds=self._plain_seconds,
            matmul_flop_per_s=matmul_rate(self._device, self._dtype),
            matmul_dtype=str(self._dtype).removeprefix("torch."),
            peak=peak,
        )
        document = json.dumps(costs.document(), indent=1)
        with writing(self.folder):
            (self.folder / "modules.md").write_text(costs.markdown(self._title), encoding="utf-8")
            (self.folder / "modules.json").write_text(document, encoding="utf-8")


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the median of some."""
    on_gpu = device.type == "cuda"
    side = 8192 if on_gpu else 512
    random = torch.Generator(device).manual_seed(0)  # the global one's state is the run's
    a, b = (torch.randn(side, side, device=device, generator=random).to(dtype) for _ in range(2))
    seconds: list[float] = []
    # No more than a second of them, but for a CPU whose bf16 is emulated. The first is a warm-up.
    while len(seconds) < 4 or (len(seconds) < 12 and sum(seconds) < 1):
        began = time.perf_counter()
        a @ b
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / statistics.median(seconds[1:])
