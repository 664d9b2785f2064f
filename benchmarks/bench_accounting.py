"""What is counted without running anything: FLOPs, launches, memory kept for the backward pass."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

import kernels
from benchmarks.bench_spectral_norm import parametrized, parametrized_weight
from benchmarks.calls import KINETICS, PAPER_SAMPLES, kinetics
from benchmarks.launches import LaunchCounter, count_spectral_launches, count_step_operators
from benchmarks.session import Session
from engine.configuration import load_config
from engine.models import build_generator
from engine.models.spectral import spectral_weights
from engine.planning.forward_pass import count_forward, count_frozen, generator_saved_for_backward

STAGES = pytest.mark.parametrize("stage_number", [1, 2])
GENERATED_ANEW = "stages.2.training.sample_bank=null"


def leave_out_stage_1_if_quick(session: Session, stage_number: int) -> None:
    """Skip the test."""
    if session.quick and stage_number == 1:
        pytest.skip("--quick counts stage 2 only")


def count_both(session: Session, what: str, of: str, unit: str, count: Callable[[], float]) -> None:
    """With the references, and with what runs by itself."""
    with kernels.use("reference"):
        plain = count()
    session.count(what, of, plain=plain, ours=count(), unit=unit)


@STAGES
@pytest.mark.parametrize("time_pooled", [False, True], ids=["time kept", "time pooled"])
def test_executed_flops(session: Session, stage_number: int, time_pooled: bool) -> None:
    """Two D updates and one G update of one sample; either reading of D's volumetric pooling."""
    leave_out_stage_1_if_quick(session, stage_number)
    key = f"stages.{stage_number}.discriminators.pool_time={str(time_pooled).lower()}"
    config = load_config(KINETICS, [key])
    what, of = "executed per step and sample", f"Kinetics-600 stage {stage_number}"
    of += ", pool_time" * time_pooled
    count_both(session, what, of, "TFLOP", lambda: count_forward(config, stage_number).step)


def test_frozen_flops(session: Session) -> None:
    """What feeding stage 2 adds to its step, generated anew and from a bank."""
    leave_out_stage_1_if_quick(session, 1)
    for name, overrides in (
        ("anew", [GENERATED_ANEW]),
        ("bank of 65 536, replaced in 1000 steps", []),
    ):
        config = load_config(KINETICS, overrides)
        what, of = f"executed by the frozen stage 1, {name}", "Kinetics-600 stage 2"
        count_both(session, what, of, "TFLOP", partial(count_frozen, config, 2))


@STAGES
def test_step_operators(session: Session, stage_number: int) -> None:
    """What a GPU's host launches, in calls; of stage 2 without the frozen stage 1."""
    leave_out_stage_1_if_quick(session, stage_number)
    read = "stages.2.training.condition_on=data", GENERATED_ANEW
    config = load_config(KINETICS, [*PAPER_SAMPLES, *read])
    what = "operators of an iteration that launch something"
    of = f"Kinetics-600 stage {stage_number}"
    count_both(session, what, of, "calls", partial(count_step_operators, config, stage_number))


def test_spectral_norm_launches(session: Session) -> None:
    """The registered operators against PyTorch's, one launch each at least."""
    with torch.device("meta"):
        generator = build_generator(kinetics(reduced=False), 2)
    plain = count_spectral_launches(generator, "reference")
    ours = count_spectral_launches(generator, "triton")
    counts = {
        f"spectral norm, {step}": counted
        for step, counted in zip(plain._fields, zip(plain, ours, strict=True), strict=True)
    }
    # torch's own, iteration and Ŵ in fp32, does the same to every matrix: counted for one of them.
    layers = spectral_weights(generator)
    module = parametrized(layers[0].weight)
    with LaunchCounter() as counter:
        parametrized_weight(module)
    torchs, both = counter.launches * len(layers), ours.iteration + ours.forward
    counts["parametrizations.spectral_norm against iteration + forward"] = torchs, both
    for what, (before, now) in counts.items():
        session.count(what, "G of stage 2", plain=before, ours=now, unit="launches")


@STAGES
def test_saved_for_backward(session: Session, stage_number: int) -> None:
    """Of the generator, in bf16."""
    leave_out_stage_1_if_quick(session, stage_number)
    config = kinetics(reduced=False)
    what, of = "saved for backward per sample", f"G of stage {stage_number}, bf16"
    count_both(
        session, what, of, "MB", lambda: generator_saved_for_backward(config, stage_number) / 1e6
    )
