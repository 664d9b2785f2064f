"""Whole training iterations against DVD-GAN and the paper's Table 3; see benchmarks/setups.py.

On a GPU they are measured at the paper's sizes. Without one they are measured at a few channels,
where most of the time is Python's and memory's, and counted at the paper's sizes.
"""

from contextlib import ExitStack, closing
from typing import Any

import pytest

from benchmarks.session import OURS, Case, Session
from benchmarks.setups import BUILDS, SETUPS
from benchmarks.whole_step import (
    REDUCED_CHANNELS,
    REDUCED_SIDES,
    Iterations,
    counted_step,
    measured_step,
    reduced,
)
from engine.models.construction import compute_dtype
from engine.trainer.ranks import Ranks

QUICK_SETUP = "stage2_6"
COUNTED = [
    name for name, build in BUILDS.items() if not (build.compiled or build.usual_samples_only)
]


def leave_out(session: Session, setup: str, build: str, quick_builds: tuple[str, ...]) -> None:
    """Skip the test if --quick says so."""
    if session.quick and (setup != QUICK_SETUP or build not in quick_builds):
        pytest.skip(f"--quick takes {' and '.join(quick_builds)} of {QUICK_SETUP} alone")


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("setup", SETUPS)
def test_whole_step(session: Session, ranks: Ranks, setup: str, build: str) -> None:
    """At the paper's sizes."""
    if session.device.type != "cuda":
        pytest.skip("an iteration of the paper's size needs a GPU")
    leave_out(session, setup, build, ("bf16", "ours"))
    step = measured_step(setup, build, ranks, session.rates.matmul_tflop_per_s)
    session.results.steps.append(step)


@pytest.mark.parametrize("setup", SETUPS)
def test_whole_step_reduced(session: Session, benchmark: Any, ranks: Ranks, setup: str) -> None:
    """Few channels, one sample, fp32: the plain builds against this engine, in turns."""
    if session.device.type == "cuda":
        pytest.skip("a GPU runs the paper's sizes")
    leave_out(session, setup, "ours", ("ours",))
    with ExitStack() as stack:
        sides: dict[str, Iterations] = {}
        for side, name in REDUCED_SIDES.items():
            if session.compiled or not BUILDS[name].compiled:
                iterations = reduced(SETUPS[setup], BUILDS[name], ranks)
                sides[side] = stack.enter_context(closing(iterations))

        def check() -> None:
            for channels_last in (False, True):
                sides[OURS].check(channels_last=channels_last)

        case = Case(
            operator="whole_step",
            shape=f"{SETUPS[setup].title}, {REDUCED_CHANNELS} channels",
            direction="step",
            dtype=compute_dtype(sides[OURS].config.stages[SETUPS[setup].number]),
            check=check,
            sides=lambda: {side: iterations.at(1) for side, iterations in sides.items()},
        )
        session.run(case, benchmark)


@pytest.mark.parametrize("build", COUNTED)
@pytest.mark.parametrize("setup", SETUPS)
def test_whole_step_counted(session: Session, setup: str, build: str) -> None:
    """FLOPs and memory at the paper's sizes, on the meta device."""
    if session.device.type == "cuda":
        pytest.skip("counted where there is no GPU: it is the same everywhere")
    leave_out(session, setup, build, ("ours",))
    session.results.steps.append(counted_step(setup, build, search=not session.quick))
