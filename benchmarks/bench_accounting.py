"""What is counted without running anything: FLOPs, launches, memory kept for the backward pass."""

import pytest
import torch

import kernels
from benchmarks.calls import KINETICS, kinetics
from benchmarks.launches import (
    count_parametrization_launches,
    count_spectral_launches,
    count_step_operators,
)
from benchmarks.session import Session
from engine.configuration import load_config
from engine.models import build_generator
from engine.planning.forward_pass import count_forward, count_frozen, generator_saved_for_backward


def leave_out_stage_1_if_quick(session: Session, stage_number: int) -> None:
    """Skip the test."""
    if session.quick and stage_number == 1:
        pytest.skip("--quick counts stage 2 only")


@pytest.mark.parametrize("stage_number", [1, 2])
@pytest.mark.parametrize("time_pooled", [False, True], ids=["time kept", "time pooled"])
def test_executed_flops(session: Session, stage_number: int, time_pooled: bool) -> None:
    """Two D updates and one G update of one sample; either reading of D's volumetric pooling."""
    leave_out_stage_1_if_quick(session, stage_number)
    key = f"stages.{stage_number}.discriminators.pool_time={str(time_pooled).lower()}"
    config = load_config(KINETICS, [key])
    ours = count_forward(config, stage_number).step
    with kernels.use("reference"):
        plain = count_forward(config, stage_number).step
    name = f"Kinetics-600 stage {stage_number}" + ", pool_time" * time_pooled
    session.count("executed per step and sample", name, plain=plain, ours=ours, unit="TFLOP")


def test_frozen_flops(session: Session) -> None:
    """What feeding stage 2 adds to its step, generated anew and from a bank."""
    leave_out_stage_1_if_quick(session, 1)
    anew = "stages.2.training.sample_bank=null"
    for name, overrides in (("anew", [anew]), ("bank of 65 536, replaced in 1000 steps", [])):
        config = load_config(KINETICS, overrides)
        ours = count_frozen(config, 2)
        with kernels.use("reference"):
            plain = count_frozen(config, 2)
        what = f"executed by the frozen stage 1, {name}"
        session.count(what, "Kinetics-600 stage 2", plain=plain, ours=ours, unit="TFLOP")


@pytest.mark.parametrize("stage_number", [1, 2])
def test_step_operators(session: Session, stage_number: int) -> None:
    """What a GPU's host launches, in calls; of stage 2 without the frozen stage 1."""
    leave_out_stage_1_if_quick(session, stage_number)
    read = ["stages.2.training.condition_on=data", "stages.2.training.sample_bank=null"]
    config = load_config(KINETICS, ["training.micro_batch=4", *read])
    ours = count_step_operators(config, stage_number)
    with kernels.use("reference"):
        plain = count_step_operators(config, stage_number)
    name = f"Kinetics-600 stage {stage_number}"
    what = "operators of an iteration that launch something"
    session.count(what, name, plain=plain, ours=ours, unit="calls")


def test_spectral_norm_launches(session: Session) -> None:
    """The registered operators against PyTorch's, one launch each at least."""
    with torch.device("meta"):
        generator = build_generator(kinetics(reduced=False), 2)
    plain = count_spectral_launches(generator, "reference")
    ours = count_spectral_launches(generator, "triton")
    for step, before, now in zip(plain._fields, plain, ours, strict=True):
        what = f"spectral norm, {step}"
        session.count(what, "G of stage 2", plain=before, ours=now, unit="launches")
    session.count(
        "parametrizations.spectral_norm against iteration + forward",
        "G of stage 2",
        plain=count_parametrization_launches(generator),
        ours=ours.iteration + ours.forward,
        unit="launches",
    )


@pytest.mark.parametrize("stage_number", [1, 2])
def test_saved_for_backward(session: Session, stage_number: int) -> None:
    """Of the generator, in bf16."""
    leave_out_stage_1_if_quick(session, stage_number)
    config = kinetics(reduced=False)
    ours = generator_saved_for_backward(config, stage_number)
    with kernels.use("reference"):
        plain = generator_saved_for_backward(config, stage_number)
    name = f"G of stage {stage_number}, bf16"
    session.count(
        "saved for backward per sample", name, plain=plain / 1e6, ours=ours / 1e6, unit="MB"
    )
