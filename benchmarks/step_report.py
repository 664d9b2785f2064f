"""Tables of whole training iterations, beside Table 3 of the paper.

Everything derived is derived here, from records of measured seconds, counted FLOPs and bytes:

- TFLOP/s: executed FLOPs over time, at the best micro-batch; HFU: that, of the bf16 matmul rate
  measured in the same call; naive MFU: the plain build's FLOPs instead of the executed ones;
- days: the paper's 300 000 iterations of 512 samples, on its 128 GPUs of 4 samples each, and on 8
  GPUs that accumulate 64 at the best micro-batch. Communication is not in them.

The paper's MB are those of its GPUs' monitor, presumably; ours are what tensors take at most.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.markdown import declared
from benchmarks.results import Attempt, Document, Row, WholeStep, by_case
from benchmarks.setups import (
    BUILDS,
    ITERATIONS,
    NODE_GPUS,
    PAPER_GPUS,
    PAPER_SAMPLES,
    SETUPS,
    USABLE_BYTES,
)
from benchmarks.timing import Spread

OPERATOR = "whole_step"
NODE_SAMPLES = PAPER_GPUS * PAPER_SAMPLES // NODE_GPUS
STAGES_GENERATED, STAGES_READ = ("stage1", "stage2_generated"), ("stage1", "stage2_12")
BASELINE = "dvdgan_50"

SIZES = {
    "build": "{build}",
    **{f"samples in {gpu}": f"{{fits[{gpu}]}}" for gpu in USABLE_BYTES},
    "peak MB": "{usual.peak_mb:.0f} at {usual.samples}",
}
COUNTED = {
    "counted at the paper's size": "{setup}",
    **SIZES,
    "executed TFLOP/sample": "{step.tflop_per_sample:.2f}",
}
MEASURED = {
    "measured on a GPU": "{setup}",
    **SIZES,
    "s/iteration of 4": "{of_four:.3g}",
    "best: s/iteration": "{best.seconds.median:.3g} of {best.samples}",
    "ms/sample": "{ms:.1f}",
    "TFLOP/s": "{tflop_per_s:.3g}",
    "HFU": "{hfu:.2f}",
    "naive MFU": "{mfu:.2f}",
    f"days, {PAPER_GPUS} GPUs": "{days:.1f}",
    f"days, {NODE_GPUS} GPUs": "{node_days:.1f}",
}
RATIOS = {
    f"stage-wise / {SETUPS[BASELINE].title}, per sample": "{what}",
    "build": "{build}",
    "time": "{generated:.2f}",
    "time, x_l from a bank": "{read:.2f}",
    "memory": "{memory:.2f}",
    "part of an 80 GB GPU": "{gpu:.2f}",
}
HOWS = {
    "measured": "measured, the paper's samples per GPU",
    "best": "measured, best micro-batch",
    "counted": "counted, FLOPs as time",
}

Steps = dict[tuple[str, ...], WholeStep]
Line = dict[str, Any]


def parts(found: dict[str, Document]) -> list[str]:
    """Markdown of the iterations in the result files; empty where they hold none."""
    steps = {step.key: step for document in found.values() for step in document.steps}
    rows = [row for d in found.values() for row in d.rows if row.operator == OPERATOR]
    if not steps and not rows:
        return []
    counted = [_sizes(step) for step in steps.values() if step.how == "counted"]
    tables = [declared(MEASURED, _measured(steps))]
    if rows:
        sides = dict.fromkeys(row.side for row in rows if row.side != "ours")
        columns = {
            "measured on a CPU, fp32, one sample": "{ours.shape}",
            "CPU s": "{ours.seconds:.3g}",
            **{f"plain, {side} / ours": f"{{{side}.of_ours:.2f}}" for side in sides},
        }
        tables.append(declared(columns, by_case(rows)))
    if counted:
        tables.append(declared(COUNTED, counted))
    tables.append(declared(RATIOS, _ratios(steps, rows)))
    return ["**Training step against DVD-GAN and Table 3 of the paper**", *tables]


def _sizes(step: WholeStep) -> Line:
    """What a step that was only counted has too."""
    setup, build = SETUPS[step.setup].title, BUILDS[step.build].title
    return {"setup": setup, "build": build, "fits": step.fits, "usual": step.usual, "step": step}


def _measured(steps: Steps) -> Iterator[Line]:
    """Of every setup: the paper's line, if there is one, and those of its builds."""
    for name, setup in SETUPS.items():
        line: Line = {"setup": setup.title, "fits": {"32 GB": "not run", "80 GB": ""}}
        paper = _paper(name)
        if paper is not None and paper.seconds_per_sample is not None:
            of_four = PAPER_SAMPLES * paper.seconds_per_sample
            fits = {"32 GB": paper.samples, "80 GB": ""}
            times = {"of_four": of_four, "days": _days(of_four)}
            yield line | {"build": "the paper's", "usual": paper, "fits": fits} | times
        measured = [step for key, step in steps.items() if key[0::2] == (name, "measured")]
        for step in measured:
            yield _sizes(step) | _times(step, _plain_tflop(steps, name))
        if not measured:
            yield line | {"build": "plain and this engine"}


def _times(step: WholeStep, plain_tflop: float | None) -> Line:
    """What a step takes; of the paper's 4 samples per GPU also where they are fewer at a time."""
    usual = step.usual.seconds_per_sample
    best = None if step.best is None else step.best.seconds_per_sample
    of_four = usual and PAPER_SAMPLES * usual
    tflop, rate = step.tflop_per_sample, step.matmul_tflop_per_s
    if best is None:
        return {"of_four": of_four}
    return {
        "of_four": of_four,
        "best": step.best,
        "ms": 1e3 * best,
        "tflop_per_s": tflop / best,
        "hfu": rate and tflop / best / rate,
        "mfu": rate and plain_tflop and plain_tflop / best / rate,
        "days": of_four and _days(of_four),
        "node_days": _days(NODE_SAMPLES * best),
    }


def _plain_tflop(steps: Steps, setup: str) -> float | None:
    for how in ("measured", "counted"):
        for build, described in BUILDS.items():
            if described.plain and (setup, build, how) in steps:
                return steps[setup, build, how].tflop_per_sample
    return None


def _days(seconds_per_iteration: float) -> float:
    return ITERATIONS * seconds_per_iteration / 86_400


def _paper(setup: str) -> Attempt | None:
    """What Table 3 says of a setup."""
    paper = SETUPS[setup].paper
    if paper is None:
        return None
    seconds = Spread(*[paper.seconds_per_iteration] * 3)
    memory = paper.memory_mb * 10**6
    return Attempt(samples=paper.samples_per_gpu, seconds=seconds, peak_bytes=memory)


# ---------------------------------------------------------- stage-wise against single-stage

Shares = dict[str, float | None]
"""What one sample of an iteration takes: time in seconds, or what stands for them, memory in bytes,
weights included, and the part of a GPU of 80 GB, one over the samples that fit."""


def _ratios(steps: Steps, rows: Sequence[Row]) -> Iterator[Line]:
    """Training time is the sum over the stages; memory is that of the larger stage."""
    for (what, build), shares in _shares(steps, rows).items():
        line: Line = {"what": what, "build": build}
        for title, together, stages, part in (
            ("generated", sum, STAGES_GENERATED, "time"),
            ("read", sum, STAGES_READ, "time"),
            ("memory", max, STAGES_GENERATED, "memory"),
            ("gpu", max, STAGES_GENERATED, "gpu"),
        ):
            base, *those = (shares.get(name, {}).get(part) for name in (BASELINE, *stages))
            known = [share for share in those if share is not None]
            if base is not None and len(known) == len(those):
                line[title] = together(known) / base
        if len(line) > 2:
            yield line


def _shares(steps: Steps, rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, Shares]]:
    """By what they are taken from, by build, then by setup."""
    found: defaultdict[tuple[str, str], dict[str, Shares]] = defaultdict(dict)
    for name in SETUPS:
        found["Table 3", "the paper's"][name] = _share(_paper(name))
    for build, described in BUILDS.items():
        of_build = [step for step in steps.values() if step.build == build]
        for how, what in HOWS.items():
            for step in of_build:
                if step.how != ("counted" if how == "counted" else "measured"):
                    continue
                share = _share(step.best if how == "best" else step.usual)
                if how == "counted":
                    share["time"] = step.tflop_per_sample
                fits = step.fits.get("80 GB")
                if share and fits:
                    share["gpu"] = 1 / fits
                found[what, described.title][step.setup] = share
    titles = {setup.title: name for name, setup in SETUPS.items()}
    for row in rows:
        title = "this engine" if row.side == "ours" else f"plain, {row.side}"
        share = {"time": row.seconds.median}
        found["measured on a CPU, reduced", title][titles[row.shape.split(",")[0]]] = share
    return found


def _share(attempt: Attempt | None) -> Shares:
    if attempt is None:
        return {}
    peak = attempt.peak_bytes
    memory = None if peak is None else peak / attempt.samples
    return {"time": attempt.seconds_per_sample, "memory": memory}
