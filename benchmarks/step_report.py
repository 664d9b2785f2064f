"""Tables of whole training iterations, beside Table 3 of the paper.

Everything derived is derived here, from records of measured seconds, counted FLOPs and bytes:

- TFLOP/s: executed FLOPs over time, at the best micro-batch; HFU: that, of the bf16 matmul rate
  measured in the same call; naive MFU: the plain build's FLOPs instead of the executed ones;
- days: the paper's 300 000 iterations of 512 samples, on its 128 GPUs of 4 samples each, and on 8
  GPUs that accumulate 64 at the best micro-batch. Communication is not in them.

The paper's MB are those of its GPUs' monitor, presumably; ours are what tensors take at most.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from benchmarks.markdown import table
from benchmarks.results import Document, Row, WholeStep
from benchmarks.setups import (
    BUILDS,
    ITERATIONS,
    NODE_GPUS,
    PAPER_GPUS,
    PAPER_SAMPLES,
    SETUPS,
    USABLE_BYTES,
    Setup,
)
from engine.planning.paper import MeasuredInPaper

OPERATOR = "whole_step"
NODE_SAMPLES = PAPER_GPUS * PAPER_SAMPLES // NODE_GPUS
STAGES_GENERATED, STAGES_READ = ("stage1", "stage2_generated"), ("stage1", "stage2_12")
BASELINE = "dvdgan_50"
SAMPLES_IN = [f"samples in {gpu}" for gpu in USABLE_BYTES]

Steps = dict[tuple[str, ...], WholeStep]
Table = Iterator[Sequence[str]]


def parts(found: dict[str, Document]) -> list[str]:
    """Markdown of the iterations in the result files; empty where they hold none."""
    steps = {step.key: step for document in found.values() for step in document.steps}
    rows = [row for d in found.values() for row in d.rows if row.operator == OPERATOR]
    if not steps and not rows:
        return []
    tables = [_measured(steps)]
    if rows:
        tables.append(_reduced(rows))
    if any(step.how == "counted" for step in steps.values()):
        tables.append(_counted(steps))
    tables.append(_ratios(steps, rows))
    title = "**Training step against DVD-GAN and Table 3 of the paper**"
    return [title, *map(table, tables)]


def ratio(row: Row | None) -> str:
    """A side's time over ours."""
    return "" if row is None or row.of_ours is None else row.of_ours.text(".2f")


# ------------------------------------------------------------------------------- the tables


def _measured(steps: Steps) -> Table:
    yield [
        *("measured on a GPU", "build", *SAMPLES_IN, "peak MB", "s/iteration of 4"),
        *("best: s/iteration", "ms/sample", "TFLOP/s", "HFU", "naive MFU"),
        *(f"days, {PAPER_GPUS} GPUs", f"days, {NODE_GPUS} GPUs"),
    ]
    for name, setup in SETUPS.items():
        if setup.paper is not None:
            yield _paper_row(setup, setup.paper)
        measured = [step for key, step in steps.items() if key[0::2] == (name, "measured")]
        for step in measured:
            yield _measured_row(setup, step, _plain_tflop(steps, name))
        if not measured:
            yield [setup.title, "plain and this engine", "not run", *[""] * 10]


def _paper_row(setup: Setup, paper: MeasuredInPaper) -> Sequence[str]:
    seconds = PAPER_SAMPLES * paper.seconds_per_iteration / paper.samples_per_gpu
    return [
        *(setup.title, "the paper's", str(paper.samples_per_gpu), ""),
        *(f"{paper.memory_mb} at {paper.samples_per_gpu}", f"{seconds:.3g}", *[""] * 5),
        *(f"{_days(seconds):.1f}", ""),
    ]


def _measured_row(setup: Setup, step: WholeStep, plain_tflop: float | None) -> Sequence[str]:
    usual = step.usual.seconds_per_sample
    # Of the paper's 4 samples per GPU, accumulated where they are fewer at a time.
    of_four = None if usual is None else PAPER_SAMPLES * usual
    cells = [*_counted_cells(setup, step), "" if of_four is None else f"{of_four:.3g}"]
    best = None if step.best is None else step.best.seconds_per_sample
    if best is None or step.best is None or step.best.seconds is None:
        return [*cells, *[""] * 7]
    rate = step.matmul_tflop_per_s
    shares = [
        "" if rate is None or tflop is None else f"{tflop / best / rate:.2f}"
        for tflop in (step.tflop_per_sample, plain_tflop)
    ]
    return [
        *(*cells, f"{step.best.seconds.median:.3g} of {step.best.samples}", f"{1e3 * best:.1f}"),
        *(f"{step.tflop_per_sample / best:.3g}", *shares),
        "" if of_four is None else f"{_days(of_four):.1f}",
        f"{_days(NODE_SAMPLES * best):.1f}",
    ]


def _counted_cells(setup: Setup, step: WholeStep) -> Sequence[str]:
    """What a step that was only counted has too."""
    fits = ["" if step.fits.get(gpu) is None else str(step.fits[gpu]) for gpu in USABLE_BYTES]
    peak = step.usual.peak_bytes
    at_peak = "" if peak is None else f"{peak / 1e6:.0f} at {step.usual.samples}"
    return [setup.title, BUILDS[step.build].title, *fits, at_peak]


def _plain_tflop(steps: Steps, setup: str) -> float | None:
    for how in ("measured", "counted"):
        for build, described in BUILDS.items():
            if described.plain and (setup, build, how) in steps:
                return steps[setup, build, how].tflop_per_sample
    return None


def _days(seconds_per_iteration: float) -> float:
    return ITERATIONS * seconds_per_iteration / 86_400


def _reduced(rows: Sequence[Row]) -> Table:
    cases: defaultdict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        cases[row.shape][row.side] = row
    sides = list(dict.fromkeys(row.side for row in rows if row.side != "ours"))
    yield ["measured on a CPU, fp32, one sample", "CPU s", *(f"plain, {s} / ours" for s in sides)]
    for shape, found in cases.items():
        if "ours" in found:
            others = [ratio(found.get(side)) for side in sides]
            yield [shape, found["ours"].seconds.text(), *others]


def _counted(steps: Steps) -> Table:
    yield [
        *("counted at the paper's size", "build", *SAMPLES_IN, "peak MB", "executed TFLOP/sample")
    ]
    for step in steps.values():
        if step.how == "counted":
            yield [*_counted_cells(SETUPS[step.setup], step), f"{step.tflop_per_sample:.2f}"]


# ---------------------------------------------------------- stage-wise against single-stage


class Share(NamedTuple):
    """What one sample of an iteration takes."""

    time: float | None = None
    """Seconds, or what stands for them."""
    memory: float | None = None
    """Bytes or MB, weights included."""
    gpu: float | None = None
    """Of a GPU of 80 GB: one over the samples that fit."""


def _ratios(steps: Steps, rows: Sequence[Row]) -> Table:
    """Training time is the sum over the stages; memory is that of the larger stage."""
    yield [
        *(f"stage-wise / {SETUPS[BASELINE].title}, per sample", "build", "time"),
        *("time, x_l from a bank", "memory", "part of an 80 GB GPU"),
    ]
    yield ["Table 3", "the paper's", *_ratio_cells(_paper_share)]
    hows = {
        "measured": "measured, the paper's samples per GPU",
        "best": "measured, best micro-batch",
        "counted": "counted, FLOPs as time",
    }
    for build, described in BUILDS.items():
        for how, what in hows.items():
            cells = _ratio_cells(partial(_step_share, steps, build, how))
            if any(cells):
                yield [what, described.title, *cells]
    for side in dict.fromkeys(row.side for row in rows):
        cells = _ratio_cells(partial(_row_share, rows, side))
        if any(cells):
            title = "this engine" if side == "ours" else f"plain, {side}"
            yield ["measured on a CPU, reduced", title, *cells]


def _ratio_cells(share_of: Callable[[str], Share]) -> Sequence[str]:
    base = share_of(BASELINE)
    generated, read = (
        list(zip(*map(share_of, names), strict=True)) for names in (STAGES_GENERATED, STAGES_READ)
    )
    return [
        _over(sum, generated[0], base.time),
        _over(sum, read[0], base.time),
        _over(max, generated[1], base.memory),
        _over(max, generated[2], base.gpu),
    ]


def _over(
    together: Callable[[list[float]], float], stages: Sequence[float | None], base: float | None
) -> str:
    known = [value for value in stages if value is not None]
    whole = base is not None and len(known) == len(stages)
    return f"{together(known) / base:.2f}" if whole and base is not None else ""


def _paper_share(name: str) -> Share:
    paper = SETUPS[name].paper
    if paper is None:
        return Share()
    samples = paper.samples_per_gpu
    return Share(paper.seconds_per_iteration / samples, paper.memory_mb / samples)


def _step_share(steps: Steps, build: str, how: str, name: str) -> Share:
    step = steps.get((name, build, "counted" if how == "counted" else "measured"))
    attempt = None if step is None else step.best if how == "best" else step.usual
    if step is None or attempt is None:
        return Share()
    fits = step.fits.get("80 GB")
    return Share(
        time=step.tflop_per_sample if how == "counted" else attempt.seconds_per_sample,
        memory=None if attempt.peak_bytes is None else attempt.peak_bytes / attempt.samples,
        gpu=1 / fits if fits else None,
    )


def _row_share(rows: Sequence[Row], side: str, name: str) -> Share:
    for row in rows:
        if row.side == side and row.shape.startswith(f"{SETUPS[name].title},"):
            return Share(row.seconds.median)
    return Share()
