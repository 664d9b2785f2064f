"""`train.py --profile`: looks at a few training steps of rank 0, then training goes on.

Under OUT/stageN/profile/ it leaves

- `trace.json.gz`: torch.profiler's trace, for Perfetto (https://ui.perfetto.dev);
- `modules.md` and `modules.json`: time, FLOPs, bytes and HFU of every part; see module_table.py;
- `memory.pickle` on a GPU: every allocation of one step with its Python stack, for
  https://pytorch.org/memory_viz. A CPU has no such record; what each part holds at the peak of
  memory stands in `modules.md` on both.

The steps are ordinary ones: what they compute, and what the ranks exchange, is the same without
a profile. The other ranks wait for rank 0 where they need it.
"""

import gzip
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile, schedule

from engine.durable_files import writing
from engine.errors import UserError
from engine.trainer.profiling import timeline
from engine.trainer.profiling.counts import OperatorCounter
from engine.trainer.profiling.module_table import StepCosts
from engine.trainer.profiling.places import Range, named_parts
from engine.trainer.step import Trainer

FOLDER = "profile"
# Before the steps that are timed: one that is slow because it is the first, one to compare with,
# one that is counted, and one in which the profiler warms up.
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
        self._counter = OperatorCounter()
        self._plain_seconds = 0.0
        self._step = -1
        self._profiler: profile | None = None

    def train_step(self, goes_on: Callable[[], bool] = lambda: True) -> dict[str, float]:
        """The next step, looked at if it is its turn; `goes_on` as `Trainer.train_step`'s."""
        self._step += 1
        if self._step == _PLAIN:
            began = time.perf_counter()
            measures = self._trainer.train_step(
                goes_on
            )  # ends by reading the measures off the device
            self._plain_seconds = time.perf_counter() - began
            return measures
        if self._step == _COUNTED:
            return self._counted_step(goes_on)
        if _WARM_UP <= self._step < NUM_STEPS_BEFORE + self._num_steps:
            return self._profiled_step(goes_on)
        return self._trainer.train_step(goes_on)

    def close(self) -> None:
        """Give up a profile that has not come to its end."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _counted_step(self, goes_on: Callable[[], bool]) -> dict[str, float]:
        on_gpu = self._device.type == "cuda"
        if on_gpu:  # in this step, because stacks take the host time
            torch.cuda.memory._record_memory_history(stacks="python")
        counter = self._counter
        with named_parts(self._trainer, counter.enter, counter.leave), counter:
            measures = self._trainer.train_step(goes_on)
        if on_gpu:
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                torch.cuda.memory._dump_snapshot(str(self.folder / "memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        return measures

    def _profiled_step(self, goes_on: Callable[[], bool]) -> dict[str, float]:
        if self._profiler is None:
            activities = [ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profiler = profile(
                activities=activities,
                schedule=schedule(wait=0, warmup=1, active=self._num_steps, repeat=1),
                on_trace_ready=self._write,
                profile_memory=True,
            )
            self._profiler.start()
        open_ranges: list[record_function] = []

        def enter(entered: Range) -> None:
            open_ranges.append(record_function(entered.label))
            open_ranges[-1].__enter__()

        def leave() -> None:
            open_ranges.pop().__exit__(None, None, None)

        with named_parts(self._trainer, enter, leave):
            measures = self._trainer.train_step(goes_on)
        self._profiler.step()
        if self._step + 1 == NUM_STEPS_BEFORE + self._num_steps:
            self.close()
        return measures

    def _write(self, profiler: profile) -> None:
        if self._step + 1 < NUM_STEPS_BEFORE + self._num_steps:
            return  # given up: stopping hands over what there is
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            trace = _exported(profiler, self.folder / "trace.json.gz")
        device_type = self._device.type
        costs = StepCosts.of(
            timeline.times(trace, device_type),
            self._counter.counted,
            device_type=device_type,
            plain_step_seconds=self._plain_seconds,
            matmul_flop_per_s=matmul_rate(self._device, self._dtype),
            matmul_dtype=str(self._dtype).removeprefix("torch."),
            peak=timeline.peak(trace, device_type),
        )
        document = json.dumps(costs.document(), indent=1)
        with writing(self.folder):
            (self.folder / "modules.md").write_text(costs.markdown(self._title), encoding="utf-8")
            (self.folder / "modules.json").write_text(document, encoding="utf-8")


def _exported(profiler: profile, file: Path) -> dict[str, Any]:
    """The trace, which `file` keeps."""
    profiler.export_chrome_trace(str(file))
    with gzip.open(file, "rt", encoding="utf-8") as text:
        try:
            trace: dict[str, Any] = json.load(text)
        except json.JSONDecodeError:  # it is written there first, and what fails is only logged
            aside = tempfile.gettempdir()
            raise UserError(f"cannot write {file}: it is cut short; is {aside} full?") from None
    return trace


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
