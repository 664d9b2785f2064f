"""A call's file as a result file: its iterations and rates, for the tables of `report.py`."""

from collections.abc import Sequence
from typing import Any

from benchmarks import results
from benchmarks.first_hour.parts import CallFile
from benchmarks.results import Attempt, Document, Rates, WholeStep
from benchmarks.setups import BUILDS, USABLE_BYTES
from engine.errors import UserError


def document_of(file: CallFile) -> Document:
    """Of what is done. Raises UserError for a file of few channels, which measured nothing."""
    if file.small:
        raise UserError(f"the {file.call} call was of --small networks: that is no result")
    done = [part.value for part in file.parts if part.status == "done"]
    values = [value for value in done if isinstance(value, dict)]
    rates = [Rates.model_validate(without_kind(v)) for v in of_kind(values, "rates")]
    flops = {v["setup"]: v["tflop_per_sample"] for v in of_kind(values, "flops")}
    attempts: dict[tuple[str, str], list[Attempt]] = {}
    for value in of_kind(values, "iteration"):
        attempt = {name: value[name] for name in Attempt.model_fields}
        key = value["setup"], value["build"]
        attempts.setdefault(key, []).append(Attempt.model_validate(attempt))
    rate = rates[-1].matmul_tflop_per_s if rates else None
    return Document(
        format=results.FORMAT,
        date=file.date,
        device=file.device,
        versions=file.versions,
        commit=file.commit,
        dirty=file.dirty,
        quick=False,
        seconds=round(sum(part.seconds or 0 for part in file.parts), 1),
        rates=rates,
        rows=[],
        counts=[],
        steps=[
            whole_step(setup, build, tried, flops[setup], rate)
            for (setup, build), tried in attempts.items()
            if setup in flops
        ],
        skipped=[],
        failed=[f"{file.call}: {p.name}" for p in file.parts if p.status in ("failed", "begun")],
    )


def of_kind(values: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Those of one kind."""
    return [value for value in values if value.get("kind") == kind]


def without_kind(value: dict[str, Any]) -> dict[str, Any]:
    """As its record has it."""
    return {name: each for name, each in value.items() if name != "kind"}


def whole_step(
    setup: str, build: str, attempts: list[Attempt], tflop_per_sample: float, rate: float | None
) -> WholeStep:
    """The record of a setup in a build, from the sizes that were tried."""
    tried = sorted(attempts, key=lambda attempt: attempt.samples)
    timed = [attempt for attempt in tried if attempt.seconds is not None]
    best = min(timed, key=seconds_per_sample, default=None)
    return WholeStep(
        setup=setup,
        build=build,
        how="measured",
        tflop_per_sample=tflop_per_sample,
        usual=tried[0],
        best=None if BUILDS[build].usual_samples_only else best,
        fits={gpu: most_that_fits(tried, size) for gpu, size in USABLE_BYTES.items()},
        matmul_tflop_per_s=rate,
    )


def seconds_per_sample(attempt: Attempt) -> float:
    """By the median."""
    assert attempt.seconds is not None
    return attempt.seconds.median / attempt.samples


def most_that_fits(attempts: Sequence[Attempt], usable_bytes: int) -> int | None:
    """Most samples, a power of two; None where twice as many were not tried."""
    fits = {attempt.samples: (attempt.peak_bytes or 0) <= usable_bytes for attempt in attempts}
    found = [n for n, fitting in fits.items() if fitting and fits.get(2 * n) is False]
    return found[0] if found else None
