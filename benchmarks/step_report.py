"""Tables of whole training iterations, beside Table 3 of the paper.

Everything derived is derived here, from records of measured seconds, counted FLOPs and bytes:

- TFLOP/s: executed FLOPs over time, at the best micro-batch; HFU: that, of the bf16 matmul rate
  measured in the same call; naive MFU: the plain build's FLOPs instead of the executed ones;
- days: the paper's 300 000 iterations of 512 samples, on its 128 GPUs of 4 samples each, and on 8
  GPUs that accumulate 64 at the best micro-batch. Communication is not in them.

The paper's MB are those of its GPUs' monitor, presumably; ours are what tensors take at most.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from benchmarks.markdown import table
from benchmarks.results import Attempt, Document, Row, WholeStep
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

OPERATOR = "whole_step"
NODE_SAMPLES = PAPER_GPUS * PAPER_SAMPLES // NODE_GPUS
STAGES_GENERATED, STAGES_READ = ("stage1", "stage2_generated"), ("stage1", "stage2_12")
BASELINE = "dvdgan_50"
NOT_RUN = "not run"

Steps = dict[tuple[str, str, str], WholeStep]


def render(found: dict[str, Document]) -> str:
    """Markdown of the iterations in the result files; empty where they hold none."""
    steps = {step.key: step for document in found.values() for step in document.steps}
    rows = [r for d in found.values() for r in d.rows if r.operator == OPERATOR]
    if not steps and not rows:
        return ""
    parts = ["**Training step against DVD-GAN and Table 3 of the paper**", table(_measured(steps))]
    if rows:
        parts.append(table(_reduced(rows)))
    if any(step.how == "counted" for step in steps.values()):
        parts.append(table(_counted(steps)))
    parts.append(table(_ratios(steps, rows)))
    return "\n\n".join(parts)


# ------------------------------------------------------------------------------- the tables


def _measured(steps: Steps) -> Iterator[Sequence[str]]:
    yield [
        *("measured on a GPU", "build", *(f"samples in {gpu}" for gpu in USABLE_BYTES), "peak MB"),
        *("s/iteration of 4", "best: s/iteration", "ms/sample", "TFLOP/s", "HFU", "naive MFU"),
        *(f"days, {PAPER_GPUS} GPUs", f"days, {NODE_GPUS} GPUs"),
    ]
    for name, setup in SETUPS.items():
        if setup.paper is not None:
            yield _paper_row(setup)
        measured = [step for key, step in steps.items() if key[0::2] == (name, "measured")]
        for step in measured:
            yield _measured_row(setup, step, _plain_tflop(steps, name))
        if not measured:
            yield [setup.title, "plain and this engine", NOT_RUN, *[""] * 10]


def _paper_row(setup: Setup) -> Sequence[str]:
    paper = setup.paper
    assert paper is not None
    seconds = PAPER_SAMPLES * paper.seconds_per_iteration / paper.samples_per_gpu
    return [
        *(setup.title, "the paper's", str(paper.samples_per_gpu), ""),
        *(f"{paper.memory_mb} at {paper.samples_per_gpu}", f"{seconds:.3g}"),
        *([""] * 5),
        *(f"{_days(seconds):.1f}", ""),
    ]


def _measured_row(setup: Setup, step: WholeStep, plain_tflop: float | None) -> Sequence[str]:
    usual, best = _seconds_of_four(step), step.best
    cells = [setup.title, BUILDS[step.build].title, *_fits(step), _peak(step.usual)]
    cells.append("" if usual is None else f"{usual:.3g}")
    if best is None or best.seconds is None:
        return [*cells, *[""] * 7]
    per_sample = best.seconds.median / best.samples
    cells += [f"{best.seconds.median:.3g} of {best.samples}", f"{1e3 * per_sample:.1f}"]
    cells.append(f"{step.tflop_per_sample / per_sample:.3g}")
    for tflop in (step.tflop_per_sample, plain_tflop):
        rate = step.matmul_tflop_per_s
        cells.append("" if rate is None or tflop is None else f"{tflop / per_sample / rate:.2f}")
    cells.append("" if usual is None else f"{_days(usual):.1f}")
    return [*cells, f"{_days(NODE_SAMPLES * per_sample):.1f}"]


def _reduced(rows: Sequence[Row]) -> Iterator[Sequence[str]]:
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(row.shape, {})[row.side] = row
    sides = list(dict.fromkeys(row.side for row in rows if row.side != "ours"))
    yield ["measured on a CPU, fp32, one sample", "CPU s", *(f"plain, {s} / ours" for s in sides)]
    for shape, found in cases.items():
        if "ours" not in found:
            continue
        ours = found["ours"].seconds
        cells = [f"{ours.median:.3g} ({ours.p20:.3g} to {ours.p80:.3g})"]
        for side in sides:
            ratio = found[side].of_ours if side in found else None
            text = (
                "" if ratio is None else f"{ratio.median:.2f} ({ratio.p20:.2f} to {ratio.p80:.2f})"
            )
            cells.append(text)
        yield [shape, *cells]


def _counted(steps: Steps) -> Iterator[Sequence[str]]:
    yield [
        *("counted at the paper's size", "build", *(f"samples in {gpu}" for gpu in USABLE_BYTES)),
        *("peak MB", "executed TFLOP/sample"),
    ]
    for (name, build, how), step in steps.items():
        if how == "counted":
            cells = [SETUPS[name].title, BUILDS[build].title, *_fits(step), _peak(step.usual)]
            yield [*cells, f"{step.tflop_per_sample:.2f}"]


# ---------------------------------------------------------- stage-wise against single-stage


class Cost(NamedTuple):
    """Of one sample and iteration."""

    time: float | None
    """Seconds, or what stands for them."""
    memory: float | None
    """Bytes or MB, weights included."""
    share: float | None = None
    """Of a GPU of 80 GB: one over the samples that fit."""


def _ratios(steps: Steps, rows: Sequence[Row]) -> Iterator[Sequence[str]]:
    """Training time is the sum over the stages; memory is that of the larger stage."""
    yield [
        f"stage-wise / {SETUPS[BASELINE].title}, per sample", "build", "time",
        "time, x_l from a bank", "memory", "part of an 80 GB GPU",
    ]  # fmt: skip
    yield ["Table 3", "the paper's", *_ratio_cells(_paper_cost)]
    for build in BUILDS:
        for how, what in (
            ("measured", "measured, the paper's samples per GPU"),
            ("best", "measured, best micro-batch"),
            ("counted", "counted, FLOPs as time"),
        ):
            cells = _ratio_cells(partial(_step_cost, steps, build, how))
            if any(cells):
                yield [what, BUILDS[build].title, *cells]
    for side in dict.fromkeys(row.side for row in rows):
        cells = _ratio_cells(partial(_row_cost, rows, side))
        if any(cells):
            title = "this engine" if side == "ours" else f"plain, {side}"
            yield ["measured on a CPU, reduced", title, *cells]


def _ratio_cells(cost: Callable[[str], Cost]) -> Sequence[str]:
    base = cost(BASELINE)
    generated, read = (
        _total([cost(n) for n in names]) for names in (STAGES_GENERATED, STAGES_READ)
    )
    return [
        _of(generated.time, base.time),
        _of(read.time, base.time),
        _of(generated.memory, base.memory),
        _of(generated.share, base.share),
    ]


def _total(stages: Sequence[Cost]) -> Cost:
    times = [stage.time for stage in stages if stage.time is not None]
    memories = [stage.memory for stage in stages if stage.memory is not None]
    whole = len(stages)
    shares = [stage.share for stage in stages if stage.share is not None]
    return Cost(
        sum(times) if len(times) == whole else None,
        max(memories) if len(memories) == whole else None,
        max(shares) if len(shares) == whole else None,
    )


def _of(a: float | None, b: float | None) -> str:
    return "" if a is None or b is None else f"{a / b:.2f}"


def _paper_cost(name: str) -> Cost:
    paper = SETUPS[name].paper
    if paper is None:
        return Cost(None, None)
    samples = paper.samples_per_gpu
    return Cost(paper.seconds_per_iteration / samples, paper.memory_mb / samples)


def _step_cost(steps: Steps, build: str, how: str, name: str) -> Cost:
    step = steps.get((name, build, "counted" if how == "counted" else "measured"))
    attempt = None if step is None else step.best if how == "best" else step.usual
    if step is None or attempt is None:
        return Cost(None, None)
    memory = None if attempt.peak_bytes is None else attempt.peak_bytes / attempt.samples
    fits = step.fits.get("80 GB")
    share = 1 / fits if fits else None
    if how == "counted":
        return Cost(step.tflop_per_sample, memory, share)
    seconds = None if attempt.seconds is None else attempt.seconds.median / attempt.samples
    return Cost(seconds, memory, share)


def _row_cost(rows: Sequence[Row], side: str, name: str) -> Cost:
    for row in rows:
        if row.side == side and row.shape.startswith(f"{SETUPS[name].title},"):
            return Cost(row.seconds.median, None)
    return Cost(None, None)


# ------------------------------------------------------------------------------------ cells


def _seconds_of_four(step: WholeStep) -> float | None:
    """Of the paper's 4 samples per GPU, accumulated where they are fewer at a time."""
    if step.usual.seconds is None:
        return None
    return step.usual.seconds.median * PAPER_SAMPLES / step.usual.samples


def _days(seconds_per_iteration: float) -> float:
    return ITERATIONS * seconds_per_iteration / 86_400


def _plain_tflop(steps: Steps, setup: str) -> float | None:
    for how in ("measured", "counted"):
        for build, described in BUILDS.items():
            if described.plain and (setup, build, how) in steps:
                return steps[setup, build, how].tflop_per_sample
    return None


def _fits(step: WholeStep) -> Sequence[str]:
    return ["" if step.fits.get(gpu) is None else str(step.fits[gpu]) for gpu in USABLE_BYTES]


def _peak(attempt: Attempt) -> str:
    if attempt.peak_bytes is None:
        return ""
    return f"{attempt.peak_bytes / 1e6:.0f} at {attempt.samples}"
