"""Whole networks on the forms that "auto" runs on CUDA, in Triton's interpreter.

Triton norms, cuDNN's convolution and one pass after it with the next norm's moments, the ConvGRU's
gates and the list of normalised weights together; in a process of its own, which interprets.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = """
import json
import traceback
from dataclasses import replace
from unittest import mock
import torch
from quick_interpreter import patch_language_once
from small_networks import clip_generator, discriminators, upsampling_generator
import kernels
from engine.models import update_spectral_norm
from engine.models.activation_checkpointing import set_checkpointing
from kernels import dispatch

patch_language_once()
for operator in dispatch._operators.values():
    # As on CUDA: "auto" passes nothing over for being on a CPU. Not measured is still not run.
    operator._implementations = tuple(
        form if form.name == "triton" and operator.name == "convolution"
        else replace(form, not_preferred=lambda device, dtype: None)
        for form in operator._implementations
    )
runs = {name: choice.implementation for name, choice in kernels.implementations("cpu").items()}
expected = {"conv_gru": "triton", "frame_norm": "triton", "convolution": "epilogue",
            "spectral_normalize_all": "triton", "power_iteration_": "triton"}
assert runs | expected == runs, runs
moments_seen = []
made = kernels.Normalized
kernels.Normalized = lambda *args, **named: (
    moments_seen.append(named["moments"] is not None) or made(*args, **named)
)


BUILD = {"clip": clip_generator, "upsampling": upsampling_generator, "D": discriminators}


def built(name, dtype=torch.float32):
    torch.manual_seed(0)
    with kernels.use("reference"):  # initialising iterates on every weight, which takes long
        network = BUILD[name](num_classes=5, compute_dtype=dtype)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    network.to(dtype)
    update_spectral_norm(network, num_iterations=2)
    return network


def results(name, network, mode="norms"):
    set_checkpointing(network, mode)
    dtype = next(network.parameters()).dtype
    random = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=random).to(dtype).requires_grad_()
    labels, z, low = torch.tensor([1, 3]), draw(2, 16), draw(2, 2, 3, 8, 8)
    if name == "D":
        inputs = [draw(2, 4, 3, 16, 16), low]
        y = network(inputs[0], labels, low, torch.tensor([[0, 2], [1, 3]])).all
    elif name == "clip":
        inputs = [z]
        y = network(z, labels, 3)
    else:
        inputs = [z, low]
        y = network(z, labels, low)
    upstream = torch.randn(y.shape, generator=random).to(y.dtype)
    grads = torch.autograd.grad(y, [*inputs, *network.parameters()], upstream)
    return torch.cat([y.detach().flatten(), *(g.flatten() for g in grads)]), y.numel()


def compare(name):
    network = built(name)
    got, count = results(name, network)
    if name == "upsampling":
        # Every norm but the first is given the moments of the convolution before it.
        assert moments_seen == [False] + 18 * [True], moments_seen
    with kernels.use("reference"):
        usual, _ = results(name, built(name))
        # Networks turn z, the sum over space and their output into fp32.
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
            truth, _ = results(name, built(name, torch.float64))
    assert truth.dtype == torch.float64
    for what, part in (("y", slice(count)), ("gradients", slice(count, None))):
        off = ((found - truth)[part].norm() / truth[part].norm() for found in (got, usual))
        error, expected = (value.item() for value in off)
        print(name, what, error, expected)
        # Both round every operator's result; that leaves a factor, and one rounding as the floor.
        assert error <= 2 * expected + torch.finfo(torch.float32).eps, (name, what, error, expected)
    assert not torch.equal(got, usual)
    again, _ = results(name, network, "blocks")
    assert torch.equal(again, got)


failures = {}
for name in BUILD:
    try:
        compare(name)
    except Exception:
        failures[name] = traceback.format_exc()
    moments_seen.clear()
print(json.dumps(failures))
"""


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    """What went wrong, by network; one process compares them all."""
    here = str(Path(__file__).parent)
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([here, *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "upsampling", "D"])
def test_as_close_to_the_truth_as_the_references(failures: dict[str, str], name: str) -> None:
    assert name not in failures, failures[name]
