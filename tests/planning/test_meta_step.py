"""A step as counted on the meta device against a real one on the CPU, by its allocator's events."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_runs import Tiny
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import kernels
from engine.configuration import Config, load_config
from engine.planning.counters import BACKWARD, FORWARD, FROZEN, Update
from engine.planning.meta_step import MetaStep, run_step
from engine.planning.stage_memory import with_training
from engine.planning.training_plan import MODES

CONFIGS = Path(__file__).parents[2] / "configs"


def sample(stage: int, mode: str) -> Config:
    batch = f"stages.{stage}.training.micro_batch=4"
    return load_config(CONFIGS / "sample.yaml", [batch, f"training.checkpointing={mode}"])


def peak(update: Update) -> int:
    return max(gradients + others for (_, gradients), others in update.most.items())


def most_allocated(run: Callable[[], object]) -> int:
    """More bytes than before, at the most, by the allocator's own account."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    now = most = 0
    events = [
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    assert len(events) > 1000
    for _, num_bytes in sorted(events, key=lambda event: event[0]):
        now += num_bytes
        most = max(most, now)
    return most


@pytest.mark.parametrize(("stage", "mode"), [(1, "norms"), *((2, mode) for mode in MODES)])
def test_peaks_are_what_is_allocated(stage: int, mode: str) -> None:
    """The same step with real tensors, in the forms that the CPU runs, within a tenth."""
    config = sample(stage, mode)
    counted = run_step(config, stage, forms="cpu", block_bytes=1)
    real = MetaStep(config, stage, "cpu")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True):
        torch.ones(1)  # the first profile of a process loses events
    for name, run in (("D", real.d_step), ("G", real.g_step)):
        found = most_allocated(run)
        assert found == pytest.approx(peak(counted.updates[name]), rel=0.1)
        print(f"{name}: allocated {found}, counted {peak(counted.updates[name])}")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("stage", "batch"), [(1, 8), (2, 16)])
def test_peaks_are_what_a_gpu_allocates(stage: int, batch: int, mode: str) -> None:
    """Kinetics-600 at full size in bf16; what cuDNN takes for itself is not predicted."""
    config = load_config(
        CONFIGS / "kinetics600.yaml",
        [f"stages.{stage}.training.micro_batch={batch}", f"training.checkpointing={mode}"],
    )
    counted = run_step(config, stage)
    real = MetaStep(config, stage, "cuda")
    for name, run in (("D", real.d_step), ("G", real.g_step)):
        run()  # kernels are compiled, algorithms chosen
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        predicted = counted.parameter_bytes + peak(counted.updates[name])
        assert torch.cuda.max_memory_allocated() == pytest.approx(predicted, rel=0.1), name


def test_checkpointing_keeps_less_and_computes_more(tiny: Tiny) -> None:
    config = tiny.config("stages.2.training.global_batch=64", "stages.2.training.micro_batch=64")
    steps = {
        mode: run_step(with_training(config, 2, checkpointing=mode), 2).generator_update
        for mode in MODES
    }
    peaks = [peak(steps[mode]) for mode in MODES]
    assert peaks[0] > peaks[1] > peaks[2]
    flops = [steps[mode].flops for mode in MODES]
    assert flops[0] == flops[1]
    assert flops[2][FORWARD] == flops[0][FORWARD]
    assert flops[2][BACKWARD] > 1.2 * flops[0][BACKWARD]


def test_flops_are_those_of_a_real_step(tiny: Tiny) -> None:
    counted = run_step(tiny.config(), 2, forms="cpu")
    real = MetaStep(tiny.config(), 2, "cpu")
    for name, run in (("D", real.d_step), ("G", real.g_step)):
        with FlopCounterMode(display=False) as counter:
            run()
        assert counter.get_total_flops() == counted.updates[name].flops.total()
    # Stage 1 makes one clip for each window, whichever network is updated.
    frozen = [update.flops[FROZEN] for update in counted.updates.values()]
    assert frozen[0] == frozen[1] > 0


def test_without_frozen_stages(tiny: Tiny) -> None:
    """Stage 1, windows of real clips, and stages trained jointly run no frozen stage."""
    for stage, changes in (
        (1, []),
        (2, ["training.condition_on=data"]),
        (2, ["stages.2.joint=true"]),
    ):
        update = run_step(tiny.config(*changes), stage).generator_update
        assert update.flops[FROZEN] == 0
        assert update.flops[FORWARD] > 0


def test_forms_of_a_gpu() -> None:
    """What is counted for a GPU is what it runs, as far as a machine without one can tell."""
    with kernels.meta_as("cuda"):
        chosen = kernels.implementations("meta", torch.bfloat16)
    assert chosen["frame_norm"].implementation == "triton"
    assert chosen["convolution"].implementation == "epilogue"
    assert chosen["conv_gru"].implementation == "triton"
    assert kernels.implementations("meta")["frame_norm"].implementation == "pytorch"
    with kernels.meta_as("cpu"):
        on_cpu, as_cpu = kernels.implementations("cpu"), kernels.implementations("meta")
    assert {n: c.implementation for n, c in on_cpu.items()} == {
        n: c.implementation for n, c in as_cpu.items()
    }
