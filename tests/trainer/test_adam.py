"""Whose Adam: what is refused before anything starts, what is built, and what it computes."""

import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import deepspeed.ops.adam
import pytest
import torch
from small_runs import Tiny
from small_trainers import make
from torch import Tensor, nn

from engine.configuration import Training
from engine.errors import UserError
from engine.models.spectral import spectral_weights
from engine.trainer.adam import check_adam, make_adam
from engine.trainer.ranks import Ranks

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
EPS = torch.finfo(torch.float32).eps


def training(tiny: Tiny, *settings: str) -> Training:
    return tiny.config(*(f"training.{setting}" for setting in settings)).stages[1].training


def refusal(tiny: Tiny, device: torch.device, *settings: str) -> str:
    with pytest.raises(UserError) as caught:
        check_adam(training(tiny, *settings), device)
    line = str(caught.value)
    assert "\n" not in line
    return line


def package(folder: Path, name: str, text: str = "", found: str | None = None) -> None:
    """Write a package, and the metadata of its version `found`."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(text)
    if found:
        metadata = folder / f"{name}-{found}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {found}\n"
        )


@pytest.mark.parametrize("adam", ["auto", "torch"])
@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_pytorchs_adam_runs_everywhere(tiny: Tiny, adam: str, device: torch.device) -> None:
    check_adam(training(tiny, f"adam={adam}"), device)
    check_adam(training(tiny, f"adam={adam}", "offload_optimizer=true"), device)


def test_offloading_needs_zero(tiny: Tiny) -> None:
    assert refusal(tiny, GPU, "zero_stage=0", "offload_optimizer=true") == (
        "training.offload_optimizer moves what ZeRO shards, and zero_stage is 0; "
        "set training.zero_stage=1, or 2 or 3"
    )


def test_deepspeeds_adam_needs_a_gpu_or_offloading(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refusal(tiny, CPU, "adam=deepspeed") == (
        "training.adam=deepspeed needs a GPU; set training.adam=auto"
    )
    for variable in ("CUDA_HOME", "CUDA_PATH", "PATH"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    tail = ": install it and put it on PATH, or set training.adam=auto"
    head = "training.adam=deepspeed is compiled on first use and needs "
    assert refusal(tiny, GPU, "adam=deepspeed") == f"{head}nvcc and ninja{tail}"
    assert refusal(tiny, CPU, "adam=deepspeed", "offload_optimizer=true") == (
        f"{head}no-such-compiler and ninja{tail}"
    )
    for program in ("nvcc", "ninja", "no-such-compiler"):
        (tmp_path / program).touch(0o755)
    check_adam(training(tiny, "adam=deepspeed"), GPU)
    check_adam(training(tiny, "adam=deepspeed", "offload_optimizer=true"), CPU)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is first on Python's path, with no apex imported from elsewhere."""
    for name in ("apex", "apex.optimizers", "amp_C"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


SOURCE = "NVIDIA's is built from source, with its CUDA extensions: https://github.com/NVIDIA/apex"


def test_no_apex(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    assert refusal(tiny, GPU, "adam=apex") == (
        f"training.adam=apex: apex is not installed; {SOURCE}"
    )


def test_the_package_indexs_apex_is_named_and_not_imported(tiny: Tiny, path: Path) -> None:
    package(path, "apex", text="raise AssertionError('imported')", found="0.9.10.dev0")
    for device in (CPU, GPU):
        assert refusal(tiny, device, "adam=apex") == (
            "training.adam=apex: the installed apex (0.9.10.dev0, from the package index) is an "
            f"unrelated project; {SOURCE}"
        )


def test_apex_without_its_extensions(tiny: Tiny, path: Path) -> None:
    package(path, "apex", found="0.1")
    package(path, "apex/optimizers")
    assert refusal(tiny, GPU, "adam=apex") == (
        f"training.adam=apex: the installed apex lacks the CUDA extension amp_C; {SOURCE}"
    )


def test_nvidias_apex(tiny: Tiny, path: Path) -> None:
    package(path, "apex", text="raise AssertionError('imported')", found="0.1")
    package(path, "apex/optimizers")
    (path / "amp_C.py").touch()
    check_adam(training(tiny, "adam=apex"), GPU)
    assert refusal(tiny, CPU, "adam=apex") == (
        "training.adam=apex needs a GPU; set training.adam=auto"
    )
    assert "runs on GPUs only" in refusal(tiny, GPU, "adam=apex", "offload_optimizer=true")


def test_a_wrong_apex_is_exit_code_2(tiny: Tiny, path: Path) -> None:
    package(path, "apex", found="0.9.10.dev0")
    finished = tiny.train(1, path / "out", "--set", "training.adam=apex")
    assert "the installed apex (0.9.10.dev0, from the package index)" in finished.error
    assert not (path / "out").exists()


class Recorder:
    """Stands for an optimizer's class, and remembers how it was called."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self.arguments, self.settings = arguments, settings


@pytest.mark.parametrize(
    ("settings", "name", "mode"),
    [
        (("adam=deepspeed",), "FusedAdam", "adam_w_mode"),
        (("adam=deepspeed", "offload_optimizer=true"), "DeepSpeedCPUAdam", "adamw_mode"),
        (("adam=apex",), "FusedAdam", "adam_w_mode"),
    ],
    ids=str,
)
def test_the_others_are_built_as_adam_not_adamw(
    tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    settings: tuple[str, ...],
    name: str,
    mode: str,
) -> None:
    """Their classes need a GPU or minutes of compiling; DeepSpeed's signature is the real one."""
    optimizers = deepspeed.ops.adam
    real = getattr(optimizers, name)
    if "adam=apex" in settings:
        apex = ModuleType("apex")
        optimizers = ModuleType("apex.optimizers")
        monkeypatch.setitem(sys.modules, "apex", apex)
        monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    monkeypatch.setattr(optimizers, name, Recorder, raising=False)
    weight = nn.Parameter(torch.zeros(3))
    given = training(tiny, *settings, "adam_betas=[0.25, 0.5]")
    made: Any = make_adam([weight], lr=0.125, training=given)
    assert isinstance(made, Recorder)
    assert made.arguments == ([weight],)
    expected = {"lr": 0.125, "betas": (0.25, 0.5), "eps": 1e-8, mode: False}
    assert made.settings == expected
    arguments = inspect.signature(real).bind([weight], **made.settings)
    arguments.apply_defaults()
    assert arguments.arguments["weight_decay"] == 0
    assert arguments.arguments["bias_correction"] is True


def adam_in_fp64(
    gradients: list[Tensor], w: Tensor, lr: float, betas: tuple[float, float]
) -> Tensor:
    """Kingma and Ba's algorithm 1, eps = 1e-8."""
    w, m, v = w.double(), torch.zeros_like(w).double(), torch.zeros_like(w).double()
    for t, gradient in enumerate(gradients, start=1):
        g = gradient.double()
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        w = w - lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + 1e-8)
    return w


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_zero_leaves_weights_at_16_bytes(tiny: Tiny, ranks: Ranks, zero_stage: int) -> None:
    """Where kernels read four values at once: no odd size lies before them."""
    trainer = make(ranks, tiny.config(f"training.zero_stage={zero_stage}"))
    for engine in (trainer.g_engine, trainer.d_engine):
        weights = [layer.weight for layer in spectral_weights(engine.module)]
        assert any(weight.numel() % 4 for weight in engine.module.parameters())
        assert all(w.data_ptr() % 16 == 0 for w in weights if w.numel() % 4 == 0)


@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.5, 0.9)])
def test_pytorchs_fused_adam_is_adam(tiny: Tiny, betas: tuple[float, float]) -> None:
    random = torch.Generator().manual_seed(3)
    start = torch.randn(1001, generator=random)  # odd: the vectorised loop leaves a rest
    num_steps, lr = 5, 1e-2
    gradients = [torch.randn(1001, generator=random) for _ in range(num_steps)]
    given = training(tiny, f"adam_betas={list(betas)}")
    weights = [nn.Parameter(start.clone()) for _ in range(2)]
    ours = make_adam([weights[0]], lr=lr, training=given)
    assert isinstance(ours, torch.optim.Adam)
    assert ours.param_groups[0]["fused"] is True
    plain = torch.optim.Adam([weights[1]], lr=lr, betas=betas, fused=False, foreach=False)
    for gradient in gradients:
        for weight, optimizer in zip(weights, (ours, plain), strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    # A step rounds the weight, half an eps of it, and an update of at most lr * a few, which some
    # ten roundings make.
    tolerance = num_steps * EPS * (start.abs() / 2 + 10 * 3 * lr)
    expected = adam_in_fp64(gradients, start, lr, betas)
    for weight in weights:
        assert ((weight.detach() - expected).abs() <= tolerance).all()
    assert (expected - start).abs().min() > 100 * tolerance.min()


@pytest.mark.parametrize(("zero_stage", "flag"), [(1, "cpu_offload"), (3, "offload_optimizer")])
def test_deepspeed_offloads_when_asked(
    tiny: Tiny, ranks: Ranks, zero_stage: int, flag: str
) -> None:
    """On a CPU that changes no value, which test_zero.py checks; so ask DeepSpeed itself."""
    for offload in (False, True):
        settings = f"zero_stage={zero_stage}", f"offload_optimizer={str(offload).lower()}"
        trainer = make(ranks, tiny.config(*(f"training.{setting}" for setting in settings)))
        for engine in (trainer.g_engine, trainer.d_engine):
            assert engine.zero_use_cpu_optimizer() == offload
            assert getattr(engine.optimizer, flag) == offload
            assert isinstance(engine.basic_optimizer, torch.optim.Adam)
            assert engine.basic_optimizer.defaults["fused"] is True
