"""What is counted without running anything: FLOPs, launches, memory kept for the backward pass."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from benchmarks.bench_spectral_norm import parametrized, parametrized_weight
from benchmarks.calls import PAPER_SAMPLES, kinetics
from benchmarks.results import Count
from benchmarks.session import Session
from benchmarks.setups import KINETICS
from engine.configuration import Config, load_config
from engine.models import build_generator
from engine.models.spectral import spectral_weights
from engine.planning.counters import ChannelsLastConvolutions
from engine.planning.forward_pass import count_forward, count_frozen, generator_saved_for_backward
from engine.planning.meta_step import MetaStep

CountBoth = Callable[[str, str, str, Callable[[], float]], None]
STAGES = pytest.mark.parametrize("stage_number", [1, 2])
GENERATED_ANEW = "stages.2.training.sample_bank=null"

# What one call of an operator of ours launches on a GPU; see the launchers in kernels/.
LAUNCHES = {
    "sswgan::power_iteration_": 4,
    "sswgan::spectral_normalize": 2,
    "sswgan::spectral_normalize_dw": 2,
    "sswgan::spectral_normalize_all": 2,
    "sswgan::spectral_normalize_all_dw": 2,
}

# Operators that only describe memory anew, or allocate it.
_WITHOUT_LAUNCH = {
    *("_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like"),
    *("empty_strided", "expand", "flatten", "new_empty", "permute", "reshape", "select", "slice"),
    *("split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view"),
}


class LaunchCounter(TorchDispatchMode):
    """Counts launches: each of PyTorch's operators that computes is one at least, ours `LAUNCHES`.

    Raises KeyError for an operator of ours that is not in the table.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count, then run."""
        self.calls[func._schema.name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def launches(self) -> int:
        """So far."""
        found = 0
        for name, count in self.calls.items():
            if name.startswith("aten::"):
                found += count * (name.removeprefix("aten::") not in _WITHOUT_LAUNCH)
            elif name in LAUNCHES:
                found += count * LAUNCHES[name]
            else:
                raise KeyError(f"{__file__}: LAUNCHES does not say what {name} launches")
        return found

    @property
    def operators(self) -> int:
        """Calls that launch something, each counted once, whatever it launches."""
        launching = [name for name in self.calls if name.split("::")[1] not in _WITHOUT_LAUNCH]
        return sum(self.calls[name] for name in launching)


def count_step_operators(config: Config, stage_number: int) -> int:
    """Operators that launch something in an iteration of one micro-batch per update.

    What a GPU runs, DeepSpeed and the optimizers left out.
    """
    with kernels.meta_as("cuda"):
        step = MetaStep(config, stage_number)
        with ChannelsLastConvolutions(), LaunchCounter() as counter:
            for _ in range(config.stages[stage_number].training.discriminator_steps):
                step.d_step()
            step.g_step()
    return counter.operators


def count_spectral_launches(network: nn.Module, implementation: str) -> dict[str, int]:
    """Of a network on the meta device, all weights together, in bf16.

    Of one power iteration, which also gives the singular values, of Ŵ and of dW.
    `implementation`: the operators' "triton", ...
    """
    layers = spectral_weights(network)
    weights = [layer.weight for layer in layers]
    lists = weights, [layer.u for layer in layers], [layer.v for layer in layers]
    dtypes, folds = [torch.bfloat16 for _ in layers], [layer.fold for layer in layers]
    counters = {step: LaunchCounter() for step in ("iteration", "forward", "backward")}
    with counters["iteration"]:
        kernels.power_iteration_(*lists, implementation=implementation)
    with counters["forward"]:
        normalized = kernels.spectral_normalize_all(
            *lists, dtypes, folds, implementation=implementation
        )
    upstream = [torch.empty_like(weight) for weight in normalized]
    with counters["backward"]:
        torch.autograd.grad(normalized, weights, upstream)
    return {step: counter.launches for step, counter in counters.items()}


# ----------------------------------------------------------------------------- what is counted


@pytest.fixture
def stage_number() -> int:
    """The stage that is counted where a test is of one alone."""
    return 1


@pytest.fixture
def count_both(session: Session, stage_number: int) -> CountBoth:
    """Counts with the references, and with what runs by itself; --quick leaves stage 1 out."""
    if session.quick and stage_number == 1:
        pytest.skip("--quick counts stage 2 only")

    def both(what: str, of: str, unit: str, count: Callable[[], float]) -> None:
        with kernels.use("reference"):
            plain = count()
        found = Count(what=what, of=of, plain=plain, ours=count(), unit=unit)
        session.results.counts.append(found)

    return both


@STAGES
@pytest.mark.parametrize("time_pooled", [False, True], ids=["time kept", "time pooled"])
def test_executed_flops(count_both: CountBoth, stage_number: int, time_pooled: bool) -> None:
    """Two D updates and one G update of one sample; either reading of D's volumetric pooling."""
    key = f"stages.{stage_number}.discriminators.pool_time={str(time_pooled).lower()}"
    config = load_config(KINETICS, [key])
    of = f"Kinetics-600 stage {stage_number}" + ", pool_time" * time_pooled
    count = partial(count_forward, config, stage_number)
    count_both("executed per step and sample", of, "TFLOP", lambda: count().step)


def test_frozen_flops(count_both: CountBoth) -> None:
    """What feeding stage 2 adds to its step, generated anew and from a bank."""
    for name, overrides in (
        ("anew", [GENERATED_ANEW]),
        ("bank of 65 536, replaced in 1000 steps", []),
    ):
        count = partial(count_frozen, load_config(KINETICS, overrides), 2)
        what = f"executed by the frozen stage 1, {name}"
        count_both(what, "Kinetics-600 stage 2", "TFLOP", count)


@STAGES
def test_step_operators(count_both: CountBoth, stage_number: int) -> None:
    """What a GPU's host launches, in calls; of stage 2 without the frozen stage 1."""
    read = "stages.2.training.condition_on=data", GENERATED_ANEW
    count = partial(count_step_operators, load_config(KINETICS, [*PAPER_SAMPLES, *read]))
    what = "operators of an iteration that launch something"
    count_both(what, f"Kinetics-600 stage {stage_number}", "calls", lambda: count(stage_number))


def test_spectral_norm_launches(session: Session) -> None:
    """The registered operators against PyTorch's, one launch each at least."""
    with torch.device("meta"):
        generator = build_generator(kinetics(reduced=False), 2)
    plain = count_spectral_launches(generator, "reference")
    ours = count_spectral_launches(generator, "triton")
    counts = {f"spectral norm, {step}": (plain[step], ours[step]) for step in plain}
    # torch's own, iteration and Ŵ in fp32, does the same to every matrix: counted for one of them.
    layers = spectral_weights(generator)
    module = parametrized(layers[0].weight)
    with LaunchCounter() as counter:
        parametrized_weight(module)
    torchs, both = counter.launches * len(layers), ours["iteration"] + ours["forward"]
    counts["parametrizations.spectral_norm against iteration + forward"] = torchs, both
    for what, (before, now) in counts.items():
        count = Count(what=what, of="G of stage 2", plain=before, ours=now, unit="launches")
        session.results.counts.append(count)


@STAGES
def test_saved_for_backward(count_both: CountBoth, stage_number: int) -> None:
    """Of the generator, in bf16."""
    count = partial(generator_saved_for_backward, kinetics(reduced=False), stage_number)
    of = f"G of stage {stage_number}, bf16"
    count_both("saved for backward per sample", of, "MB", lambda: count() / 1e6)
