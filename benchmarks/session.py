"""One run of the benchmarks: checks, measures and collects what goes into the result file."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import results
from benchmarks.operators import OURS, Case
from benchmarks.results import Count, Feed, Rates, Row, Skip, WholeStep
from benchmarks.timing import Stopwatch, Turns, measure, num_rounds, paired_ratios, spread

MOST_ROUNDS = 51


@dataclass
class Session:
    """Measures cases on one device and remembers the results."""

    device: torch.device
    quick: bool = False
    compiled: bool = False
    """Whether torch.compile of the references is a side."""
    compile_asked: bool = False
    """Whether it is also where compilation takes longer than all other cases together."""
    budget_seconds: float | None = None
    """When to stop starting cases; None never."""
    seconds_per_case: float = 1.0
    """What the rounds of a case may take together, at the least number of rounds more."""
    least_rounds: int = 5
    """Of a case, however long they take."""
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    rows: list[Row] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)
    steps: list[WholeStep] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)
    feeds: list[Feed] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    commit: tuple[str | None, bool | None] = field(default_factory=results.this_commit)
    """Of the code that was loaded, not of what the tree holds when the run ends."""
    _device: results.Device = field(default_factory=results.this_device)
    started: float = field(default_factory=time.monotonic)
    _rates: Rates | None = None

    @property
    def rates(self) -> Rates:
        """Measured when first asked for."""
        if self._rates is None:
            self._rates = measure_rates(self.device)
        return self._rates

    @property
    def seconds(self) -> float:
        """Since the session began, wall time."""
        return time.monotonic() - self.started

    @property
    def over_budget(self) -> bool:
        """Whether no further case is to be started."""
        return self.budget_seconds is not None and self.seconds > self.budget_seconds

    def run(self, case: Case, benchmark: Any) -> None:
        """Check a case, then measure it through pytest-benchmark's fixture. Raises Refused.

        pytest-benchmark's own statistics are of our side; they are read off the session's
        stopwatch, so they are the same times as in the rows.
        """
        case.check()
        sides = case.sides()
        for run in sides.values():  # compilation, autotuning, first allocations
            run()
        per_round = sum(measure(run, self.device) for run in sides.values())
        allowed = case.patience * self.seconds_per_case
        rounds = num_rounds(per_round, allowed, self.least_rounds, MOST_ROUNDS)
        turns = Turns(sides, OURS, self.device, self.stopwatch)
        benchmark.pedantic(turns.main, setup=turns.before, teardown=turns.after, rounds=rounds)
        # Where pytest-benchmark is switched off it calls once and does not tear down.
        taken = {name: len(seconds) for name, seconds in turns.seconds.items()}
        if set(taken.values()) != {rounds}:
            raise RuntimeError(f"{rounds} rounds were asked for; pytest-benchmark ran {taken}")
        for name, seconds in turns.seconds.items():
            peak = peak_bytes(sides[name], self.device)
            self.rows.append(make_row(case, name, seconds, turns.seconds[OURS], self.rates, peak))

    def skip(self, case: str, reason: str) -> None:
        """Remember why a case is not measured."""
        self.skipped.append(Skip(case=case, reason=reason))

    def count(self, what: str, of: str, *, plain: float | None, ours: float, unit: str) -> None:
        """Remember something counted."""
        self.counts.append(Count(what=what, of=of, plain=plain, ours=ours, unit=unit))

    def document(self) -> results.Document:
        """The result file's contents."""
        commit, dirty = self.commit
        return results.Document(
            format=results.FORMAT,
            date=results.now(),
            device=self._device,
            versions=results.these_versions(),
            commit=commit,
            dirty=dirty,
            quick=self.quick,
            seconds=round(self.seconds, 1),
            rates=[] if self._rates is None else [self._rates],
            rows=self.rows,
            counts=self.counts,
            steps=self.steps,
            feeds=self.feeds,
            skipped=self.skipped,
            failed=self.failed,
        )


def make_row(
    case: Case,
    side: str,
    seconds: list[float],
    ours: list[float],
    rates: Rates,
    peak: int | None,
) -> Row:
    """A side's row: its times, and the rates at which it does what the case costs at least."""
    times = spread(seconds)
    gb_per_s = tflop_per_s = None
    if case.cost is not None:
        gb_per_s = case.cost.num_bytes / times.median / 1e9
        tflop_per_s = case.cost.flops / times.median / 1e12
    return Row(
        operator=case.operator,
        shape=case.shape,
        direction=case.direction,
        side=side,
        dtype=str(case.dtype).removeprefix("torch."),
        rounds=len(seconds),
        seconds=times,
        of_ours=None if side == OURS else paired_ratios(seconds, ours),
        gb_per_s=gb_per_s,
        tflop_per_s=tflop_per_s,
        share_of_copy=None if gb_per_s is None else gb_per_s / rates.copy_gb_per_s,
        share_of_matmul=None if tflop_per_s is None else tflop_per_s / rates.matmul_tflop_per_s,
        peak_bytes=peak,
    )


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Most memory that a call allocates beyond what is there; None on a CPU, which does not say."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def measure_rates(device: torch.device) -> Rates:
    """Copy bandwidth and matmul rate, medians of eleven: bf16 on a GPU, fp32 on a CPU."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    num_values, side = (1 << 29, 8192) if on_gpu else (1 << 25, 1024)
    source = torch.ones(num_values, dtype=dtype, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

    def median(run: Callable[[], object]) -> float:
        for _ in range(2):
            run()
        return spread([measure(run, device) for _ in range(11)]).median

    copy_seconds = median(lambda: target.copy_(source))
    return Rates(
        copy_gb_per_s=2 * source.nbytes / copy_seconds / 1e9,
        matmul_tflop_per_s=2 * side**3 / median(lambda: a @ b) / 1e12,
        matmul_dtype=str(dtype).removeprefix("torch."),
    )
