"""One run of the benchmarks: checks, measures and collects what goes into the result file."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.results import Document, Rates, Row, made_here
from benchmarks.timing import (
    Run,
    Sides,
    measure,
    num_rounds,
    paired_ratios,
    sample,
    spread,
    take_turns,
)
from kernels.common.floor import Cost

OURS, REFERENCE, COMPILED = "ours", "reference", "compiled"
MOST_ROUNDS = 51


@dataclass
class Case:
    """One thing to be measured: what is compared, at which size, after which check."""

    operator: str
    shape: str
    direction: str
    dtype: torch.dtype
    check: Callable[[], None]  # raises `Refused`
    sides: Callable[[], Sides]
    """Makes the sides; called after the check."""
    cost: Cost | None = None
    patience: float = 1.0
    """Times what the session gives a case. More for what few rounds do not settle."""


@dataclass
class Session:
    """Measures cases on one device and remembers the results."""

    device: torch.device
    quick: bool = False
    compiled: bool = False  # whether torch.compile of the references is a side
    compile_asked: bool = False
    """Whether it is also where compilation takes longer than all other cases together."""
    budget_seconds: float | None = None  # when to stop starting cases; None never
    seconds_per_case: float = 1.0
    """What the rounds of a case may take together, at the least number of rounds more."""
    least_rounds: int = 5  # of a case, however long they take
    clock: float = 0.0
    """Seconds that our side has been measured for, which pytest-benchmark reads as its timer."""
    passed: list[str] = field(default_factory=list)
    results: Document = field(init=False)
    """Begun with the run, so its commit is that of the code that was loaded."""

    def __post_init__(self) -> None:
        self.results = Document.begun(made_here(), quick=self.quick)
        self._started = time.monotonic()

    @property
    def rates(self) -> Rates:
        """Measured when first asked for."""
        if not self.results.rates:
            self.results.rates.append(measure_rates(self.device))
        return self.results.rates[0]

    @property
    def over_budget(self) -> bool:
        """Whether no further case is to be started."""
        seconds = time.monotonic() - self._started
        return self.budget_seconds is not None and seconds > self.budget_seconds

    def document(self) -> Document:
        """The result file's contents by now."""
        seconds = round(time.monotonic() - self._started, 1)
        return self.results.model_copy(update={"seconds": seconds})

    def run(self, case: Case, benchmark: Any) -> None:
        """Check a case, then measure it, and tell pytest-benchmark's fixture. Raises Refused."""
        case.check()
        sides = case.sides()
        for run in sides.values():  # compilation, autotuning, first allocations
            run()
        per_round = sum(measure(run, self.device) for run in sides.values())
        allowed = case.patience * self.seconds_per_case
        rounds = num_rounds(per_round, allowed, self.least_rounds, MOST_ROUNDS)
        seconds = take_turns(sides, OURS, rounds, self.device)
        ours = iter(seconds[OURS])

        def once_more() -> None:
            self.clock += next(ours)

        benchmark.pedantic(once_more, rounds=rounds)  # its statistics are of the same times
        for name, run in sides.items():
            peak = peak_bytes(run, self.device)
            row = make_row(case, name, seconds[name], seconds[OURS], self.rates, peak)
            self.results.rows.append(row)


def make_row(
    case: Case, side: str, seconds: list[float], ours: list[float], rates: Rates, peak: int | None
) -> Row:
    """A side's row: its times, and the rates at which it does what the case costs at least."""
    times = spread(seconds)
    speed: dict[str, float] = {}
    if case.cost is not None:
        gb_per_s = case.cost.num_bytes / times.median / 1e9
        tflop_per_s = case.cost.flops / times.median / 1e12
        speed = {
            "gb_per_s": gb_per_s,
            "tflop_per_s": tflop_per_s,
            "share_of_copy": gb_per_s / rates.copy_gb_per_s,
            "share_of_matmul": tflop_per_s / rates.matmul_tflop_per_s,
        }
    return Row(
        operator=case.operator,
        shape=case.shape,
        direction=case.direction,
        side=side,
        dtype=str(case.dtype).removeprefix("torch."),
        rounds=len(seconds),
        seconds=times,
        of_ours=None if side == OURS else paired_ratios(seconds, ours),
        peak_bytes=peak,
        **speed,
    )


def peak_bytes(run: Run, device: torch.device) -> int | None:
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

    def median(run: Run) -> float:
        for _ in range(2):
            run()
        return spread(sample(run, device, 0, least=11, most=11)).median

    copy_seconds = median(lambda: target.copy_(source))
    return Rates(
        copy_gb_per_s=2 * source.nbytes / copy_seconds / 1e9,
        matmul_tflop_per_s=2 * side**3 / median(lambda: a @ b) / 1e12,
        matmul_dtype=str(dtype).removeprefix("torch."),
    )
