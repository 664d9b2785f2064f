"""How an operator's implementation is chosen, and what is said about it."""

import subprocess
import sys

import pytest
import torch

import kernels
from kernels import dispatch
from kernels.dispatch import Implementation, Operator

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def operator(monkeypatch: pytest.MonkeyPatch) -> Operator:
    monkeypatch.setattr(dispatch, "_operators", {})
    return Operator(
        "op",
        Implementation("triton", dispatch.triton_unsupported, dispatch.triton_not_preferred),
        Implementation("pytorch", dispatch.everywhere),
    )


def test_auto_takes_the_best_that_can_run(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert operator.choose(None, CUDA, torch.bfloat16) == "triton"
    assert operator.choose("auto", CUDA, torch.float64) == "pytorch"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert operator.choose(None, CPU, torch.float32) == "pytorch"
    assert operator.choose("triton", CPU, torch.float32) == "triton"
    monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", False)
    choice = operator.explain(None, CUDA, torch.float32)
    assert choice.implementation == "pytorch"
    assert choice.reason == "not triton: triton is not installed"


def test_what_is_asked_for_and_cannot_run_raises(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for device, dtype, reason in (
        (CPU, torch.float32, "tensors are on the CPU and TRITON_INTERPRET=1 is not set"),
        (CUDA, torch.float64, "float64 is not among fp32, fp16 and bf16"),
    ):
        with pytest.raises(kernels.ImplementationError) as error:
            operator.choose("triton", device, dtype)
        assert str(error.value) == f"kernels.op cannot run as triton: {reason}"
    with pytest.raises(kernels.ImplementationError, match="only triton, pytorch, reference"):
        operator.choose("cudnn", CUDA, torch.float32)


def test_the_setting_yields_to_the_argument(operator: Operator) -> None:
    with kernels.use("reference"):
        assert operator.choose(None, CUDA, torch.float32) == "reference"
        assert operator.choose("auto", CUDA, torch.float32) == "triton"
        with kernels.use("auto"):
            assert operator.choose(None, CUDA, torch.float32) == "triton"
        assert kernels.implementations("cuda")["op"].implementation == "reference"
    assert kernels.implementations("cuda")["op"].implementation == "triton"
    for setting in ("triton", "fast"):
        with (
            pytest.raises(ValueError, match=f"auto or reference, not to '{setting}'"),
            kernels.use(setting),
        ):
            pass


def test_the_environment_sets_it_at_first() -> None:
    """In a process of its own, where Triton must not have been imported either."""
    script = (
        "import sys, torch, kernels\n"
        "x, scale = torch.randn(1, 1, 2, 3, 3, requires_grad=True), torch.ones(1, 2)\n"
        "kernels.frame_norm(x, scale, scale)\n"
        "print(kernels.implementations('cpu')['frame_norm'].implementation)\n"
        "print('triton' in sys.modules)\n"
    )
    environment = {"KERNELS": "reference", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["reference", "False"]
    environment["KERNELS"] = "fast"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.stderr.splitlines()[-1] == (
        "ValueError: kernels can be set to auto or reference, not to 'fast'"
    )


def test_every_operator_says_what_it_runs() -> None:
    choices = kernels.implementations("cpu")
    assert choices["conv_gru"].implementation == "pytorch"
    assert choices["conv_gru"].reason == "not triton: " + (
        "tensors are on cpu, not on CUDA"
        if dispatch.interpreting()
        else "tensors are on the CPU and TRITON_INTERPRET=1 is not set"
    )
