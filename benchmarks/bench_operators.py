"""Every operator with a video as its input, at the sizes that the networks call it with."""

from typing import Any

import pytest

from benchmarks.calls import Call
from benchmarks.operators import Direction, nothing_to_compare, operator_case
from benchmarks.session import Session


def run(session: Session, benchmark: Any, call: Call, direction: Direction) -> None:
    """Measure, where there is something to compare with."""
    on_gpu = session.device.type == "cuda"
    nothing = nothing_to_compare(call.operator, session.device, call.x.dtype)
    if nothing is not None and not on_gpu:
        pytest.skip(nothing)
    case = operator_case(call, direction, session.device, compiled=session.compiled, plain=on_gpu)
    session.run(case, benchmark)


@pytest.mark.calls(operator="frame_norm", stage_number=2)
def test_frame_norm(session: Session, benchmark: Any, call: Call, direction: Direction) -> None:
    """Stage 2's generator."""
    run(session, benchmark, call, direction)


@pytest.mark.calls(operator="conv_gru", stage_number=1)
def test_conv_gru(session: Session, benchmark: Any, call: Call, direction: Direction) -> None:
    """Stage 1's generator; at 4x4 pixels x is the same at every time step."""
    run(session, benchmark, call, direction)


@pytest.mark.calls(operator="separable_conv3d", stage_number=2)
def test_separable_conv3d(
    session: Session, benchmark: Any, call: Call, direction: Direction
) -> None:
    """Stage 2's generator, with the residual, and with x_l where it is injected."""
    run(session, benchmark, call, direction)


@pytest.mark.calls(operator="upsample_conv", stage_number=2)
def test_upsample_conv(session: Session, benchmark: Any, call: Call, direction: Direction) -> None:
    """Stage 2's generator."""
    run(session, benchmark, call, direction)


@pytest.mark.calls(operator="conv2d", stage_number=2)
def test_conv2d(session: Session, benchmark: Any, call: Call, direction: Direction) -> None:
    """Stage 2's generator."""
    run(session, benchmark, call, direction)


@pytest.mark.calls(operator="conv_pool2d", stage_number=2, network="discriminators")
def test_conv_pool2d(session: Session, benchmark: Any, call: Call, direction: Direction) -> None:
    """Stage 2's discriminators."""
    run(session, benchmark, call, direction)


@pytest.mark.calls(operator="conv_pool3d", stage_number=2, network="discriminators")
def test_conv_pool3d(session: Session, benchmark: Any, call: Call, direction: Direction) -> None:
    """Stage 2's temporal and matching discriminators."""
    run(session, benchmark, call, direction)
