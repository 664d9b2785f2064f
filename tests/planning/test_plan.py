"""Plans: what fits, how long it takes, and what `engine/plan.py` prints."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from convolution_sizes import ConvolutionSizes
from small_runs import Tiny, call

import engine.plan
from engine.configuration import Config, SampleBank, load_config
from engine.errors import UserError
from engine.planning.assumptions import DEVICES, Assumptions, find_device, share_of
from engine.planning.comparison import compare
from engine.planning.counters import BACKWARD, FORWARD, FROZEN, Update
from engine.planning.meta_step import Step, run_step
from engine.planning.micro_batch import StageMemory, divisors
from engine.planning.rank_memory import Scaling, find_peak, networks_of
from engine.planning.step_time import predict, work_of
from engine.planning.training_plan import Planner

CONFIGS = Path(__file__).parents[2] / "configs"
# As the paper: every window is generated anew.
KINETICS = load_config(CONFIGS / "kinetics600.yaml", ["stages.2.training.sample_bank=null"])
TRAINING = KINETICS.stages[2].training
ALONE = Scaling(zero_stage=0, num_ranks=1, accumulates=False)


def step_of(micro_batch: int) -> Step:
    """A made-up step: G of 100 values, D of 50, 1000 bytes of frozen weights.

    D keeps 10 bytes per sample; G 30 when its backward pass begins and 20 + 900 when it ends, with
    all 400 bytes of gradients.
    """
    d_update = Update({(FORWARD, 0): 10 * micro_batch, (BACKWARD, 200): 5, (FORWARD, 200): 0})
    g_update = Update(
        {
            (FORWARD, 0): 25 * micro_batch,
            (BACKWARD, 0): 30 * micro_batch,
            (BACKWARD, 400): 20 * micro_batch + 900,
            (FORWARD, 400): 7,
        }
    )
    for update, scale in ((d_update, 1), (g_update, 3)):
        update.flops.update({FORWARD: scale * micro_batch, FROZEN: 100 * micro_batch})
        update.moved.update({FORWARD: 2 * scale * micro_batch})
    return Step(micro_batch, d_update, g_update, 1600, [60, 40], [50])


def test_a_peak_by_hand() -> None:
    """Parameters 1600; Adam's moments 2 * 600; then the larger of 30 B and 20 B + 900 + 400."""
    peak = find_peak(step_of(10), TRAINING, ALONE)
    assert (peak.update, peak.phase) == ("G", BACKWARD)
    assert (peak.parameters, peak.optimizer) == (1600, 1200)
    assert (peak.gradients, peak.activations) == (400, 1100)
    assert peak.total == 1600 + 1200 + 1500
    peak = find_peak(step_of(200), TRAINING, ALONE)
    assert (peak.gradients, peak.activations) == (0, 6000)
    # The second micro-batch begins with the first one's gradients.
    peak = find_peak(step_of(200), TRAINING, ALONE._replace(accumulates=True))
    assert (peak.gradients, peak.activations) == (400, 6000)
    # Hardly any activations: reducing the gradients, in a copy, is the most.
    small = step_of(0)
    small.generator_update.most[BACKWARD, 400] = 0
    peak = find_peak(small, TRAINING, ALONE)
    assert (peak.update, peak.phase, peak.gradients, peak.activations) == ("G", "optimizer", 800, 7)


def test_an_average_of_the_weights_is_counted() -> None:
    averaged = TRAINING.model_copy(update={"ema_decay": 0.9})
    more = (
        find_peak(step_of(1), averaged, ALONE).total - find_peak(step_of(1), TRAINING, ALONE).total
    )
    assert more == 4 * 100


def test_zero_shards_what_it_should() -> None:
    """Two ranks: half of the moments, and a copy of half of the weights; D's 50 are cut at 26."""
    peak = find_peak(step_of(10), TRAINING, Scaling(1, 2, accumulates=False))
    assert (peak.parameters, peak.optimizer) == (1600, 3 * (200 + 104))
    assert networks_of(step_of(10), TRAINING, Scaling(3, 2, False))["G"].weights == 200


def test_an_offloaded_optimizer() -> None:
    """Of two ranks: of each network its largest weight's buffer stays, 60 and 50 values."""
    offloading = TRAINING.model_copy(update={"offload_optimizer": True})
    peak = find_peak(step_of(10), offloading, Scaling(1, 2, accumulates=False))
    assert (peak.parameters, peak.optimizer) == (1600, 4 * (60 + 50))
    # A copy, gradients, a buffer and two moments of each half; and a buffer of the largest.
    assert peak.host == 5 * (200 + 104) + 4 * (60 + 50)
    assert find_peak(step_of(10), offloading, ALONE).optimizer == 1200  # ZeRO-0: all stays


def test_the_largest_micro_batch_that_fits() -> None:
    """Accumulating: rest 2800, gradients 400; 30 B, or 20 B + 900 up to 90 samples."""
    counted = []

    def run(config: Config, number: int) -> Step:
        counted.append(config.stages[number].training.samples_per_pass)
        return step_of(counted[-1])

    memory = StageMemory(KINETICS, 2, {}, run)

    def fits(micro_batch: int) -> int:
        return find_peak(step_of(micro_batch), TRAINING, ALONE._replace(accumulates=True)).total

    assert memory.largest(64, ALONE, 1e9) == 64
    assert memory.largest(64, ALONE, fits(16)) == 16
    assert memory.largest(64, ALONE, fits(16) - 1) == 8
    assert memory.largest(64, ALONE, 10) is None
    # 40 samples to 2^31 values; the frozen stage's are in either update.
    memory.steps[64].generator_update.most_values = 2**31 * 64 // 40
    assert memory.largest(64, ALONE, 1e9) == 32
    memory.steps[64].generator_update.most_values = 0
    assert sorted(counted) == [1, 64]  # the rest is interpolated
    assert memory.bound(16, ALONE._replace(accumulates=True)) == fits(16)
    # Between 16 and 256 samples lies the bend: the line through both is above it.
    bent = StageMemory(KINETICS, 2, {}, run)
    bent.step(16)
    bent.step(256)
    assert bent.bound(91, ALONE) > find_peak(step_of(91), TRAINING, ALONE).total


def test_shares() -> None:
    assert list(divisors(12)) == [12, 6, 4, 3, 2, 1]
    assert share_of(KINETICS, 2, 8) == 64
    for num_gpus, remedy in ((3, "--gpus 2, .*global_batch=513"), (1024, "--gpus 512")):
        with pytest.raises(UserError, match=f"cannot share .* 512 evenly; use {remedy}"):
            share_of(KINETICS, 2, num_gpus)


def test_seconds_by_hand() -> None:
    """Two D updates of 1 + 100 FLOPs per sample and one of G of 3 + 100; bytes 2 and 6."""
    step = step_of(4)
    work = work_of(step, TRAINING)
    assert (work.flops, work.frozen_flops, work.moved_bytes) == (5, 300, 10)
    device = find_device(
        "h100", tflops=1e-10, bandwidth_gb_per_second=1e-9, link_gb_per_second=1e-8
    )
    seconds = predict(
        step, TRAINING, Scaling(0, 2, False), device, hfu=0.5, num_samples=8, num_micro_batches=1
    )
    assert seconds.computing == pytest.approx(8 * 305 / 50)
    assert seconds.moving == pytest.approx(8 * 10)
    # An all-reduce on two ranks sends each network once: G 400 bytes, D twice 200, of 7 a second.
    assert seconds.communicating == pytest.approx(800 / 7)
    assert seconds.total == seconds.moving + seconds.communicating
    # ZeRO-3: a rank's half of D goes out 3 times in each of two updates and once in G's; of G 3
    # times in its own and once in each of D's.
    sharded = predict(
        step, TRAINING, Scaling(3, 2, False), device, hfu=0.5, num_samples=8, num_micro_batches=1
    )
    assert sharded.communicating == pytest.approx((7 * 100 + 5 * 200) / 7)


def test_a_bank_makes_fewer_videos() -> None:
    """A quarter of a batch in each iteration, where three windows per sample were made."""
    overrides = ["stages.2.training.sample_bank={num_videos: 12800, refresh_every: 100}"]
    banked = load_config(CONFIGS / "kinetics600.yaml", overrides).stages[2].training
    assert work_of(step_of(4), banked).frozen_flops == pytest.approx(300 * 128 / (3 * 512))


def test_reused_fakes_need_a_window_less() -> None:
    """G generates for D's two updates only; the planner's step says what it computes itself."""
    reusing = TRAINING.model_copy(update={"reuse_fakes": True})
    step = step_of(4)
    step.generator_update.flops[FROZEN] = 0  # as counted where nothing is generated
    assert work_of(step, reusing).frozen_flops == 200
    bank = SampleBank(num_videos=12800, refresh_every=100)
    banked = reusing.model_copy(update={"sample_bank": bank})
    assert work_of(step, banked).frozen_flops == pytest.approx(200 * 128 / (2 * 512))
    device = find_device("h100", link_gb_per_second=1e-8)
    plain, reused = (
        predict(step, t, Scaling(3, 2, False), device, hfu=1, num_samples=8, num_micro_batches=1)
        for t in (TRAINING, reusing)
    )
    # ZeRO-3: a rank's half of G, 200 bytes, goes out once less.
    assert plain.communicating - reused.communicating == pytest.approx(200 / 7)


def test_reused_fakes_are_not_planned_with_accumulation(tiny: Tiny) -> None:
    """Where one micro-batch of the whole share does not fit, nothing does."""
    batches = "training.global_batch=8", "training.micro_batch=8"
    configs = [tiny.config(*batches, f"training.reuse_fakes={r}") for r in ("true", "false")]
    memory = StageMemory(configs[0], 2, {}, partial(run_step, block_bytes=1))
    alone = Scaling(1, 1, False)
    limit_gb = (memory.peak(8, alone).total - 1) / 1e9
    device = find_device("h100", memory_gb=limit_gb)
    assumptions = Assumptions(device, num_gpus=1, reserve_gb=0, hfu=0.5)
    found = []
    for config in configs:
        planner = Planner(assumptions, lambda line: None)
        rows = planner.plan(config, 2).rows
        (row,) = [r for r in rows if (r.zero_stage, r.checkpointing) == (1, "norms")]
        found.append(row.largest)
    assert found[0] is None
    assert found[1] is not None


def test_the_papers_figures_stand_beside_the_papers_models_only() -> None:
    """BDD100K's first stage has the size of Kinetics-600's, but not its classes and channels."""
    assumptions = Assumptions(find_device("h100"), num_gpus=8, reserve_gb=6, hfu=0.5)
    planner = Planner(assumptions, lambda line: None)
    found = {}
    for name in ("bdd100k", "kinetics600"):
        config = load_config(CONFIGS / f"{name}.yaml")
        first = config.model_copy(update={"stages": {1: config.stages[1]}})
        compared = compare(planner, assumptions, first, first, "bf16")
        found[name] = [each.paper and each.paper.memory_mb for each in compared]
    assert found == {"bdd100k": [None, None], "kinetics600": [27_897, 27_897]}


def test_devices() -> None:
    for name, device in DEVICES.items():
        assert device.name == name
        assert device.source
        assert device.tflops("fp32") < (device.bf16_tflops or 1e9)
    assert find_device("h100", memory_gb=80) == DEVICES["h100"]
    assert "command line" in find_device("h100", memory_gb=40).source
    assert find_device("v100", tflops=60).tflops("bf16") == 60
    with pytest.raises(UserError, match="v100 has no bf16; plan with --set"):
        find_device("v100").tflops("bf16")


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "limit_gb"), [("norms", 60), ("blocks", 40)])
def test_stage_2_fits_one_node(mode: str, limit_gb: float) -> None:
    """The paper's batch of 512 on eight GPUs of 80 GB, in one pass, ZeRO-1, within limits."""
    config = load_config(
        CONFIGS / "kinetics600.yaml",
        ["stages.2.training.micro_batch=64", f"training.checkpointing={mode}"],
    )
    peak = find_peak(run_step(config, 2), TRAINING, Scaling(1, 8, accumulates=False))
    print(peak, peak.total / 1e9)
    assert 0.5 * limit_gb < peak.total / 1e9 <= limit_gb


def test_no_convolution_exceeds_what_is_indexed() -> None:
    """The paper's batch on one node, 64 samples for each GPU: beyond 54 convolutions run in parts.

    The largest are the frozen stage's gates, 25 frames of 32x32 of 3 x 512 channels a sample.
    """
    config = load_config(
        CONFIGS / "kinetics600.yaml",
        ["stages.2.training.micro_batch=64", "stages.2.training.sample_bank=null"],
    )
    with ConvolutionSizes() as sizes:
        step = run_step(config, 2)
    assert step.most_samples == (2**31 - 1) // (25 * 32 * 32 * 3 * 512) == 54
    assert 2**30 < max(sizes.largest) < 2**31


# -------------------------------------------------------------------------------- script

Plan = Callable[..., Any]


@pytest.fixture
def plan(tiny: Tiny) -> Plan:
    def run(*arguments: str) -> Any:
        return call(engine.plan.main, "--config", tiny.config_file, *arguments)

    return run


def test_json(plan: Plan) -> None:
    finished = plan("--stage", "2", "--gpus", "2", "--json", "--set", "training.micro_batch=1")
    assert finished.code == 0, finished.err
    found = json.loads(finished.out)
    assert (found["samples_per_gpu"], found["micro_batch"]) == (2, 1)
    assert found["device"]["name"] == "h100"
    rows = {(row["zero_stage"], row["checkpointing"]): row for row in found["rows"]}
    assert len(rows) == 4 * 3
    for row in rows.values():
        parts = (row["peak"][n] for n in ("parameters", "optimizer", "gradients", "activations"))
        assert row["peak"]["total"] == sum(parts)
        assert row["fits"]
        largest = row["largest"]
        assert (largest["micro_batch"], largest["accumulation"]) == (2, 1)
        days = largest["seconds"]["total"] * found["iterations"] / 86_400
        assert largest["days"] == pytest.approx(days)
    assert rows[1, "none"]["peak"]["optimizer"] < rows[0, "none"]["peak"]["optimizer"]
    assert found["comparison"] == []
    assert "counting a step of tiny, stage 2: checkpointing blocks, micro-batch 2" in finished.err


def test_text_and_comparison(plan: Plan, tmp_path: Path) -> None:
    """With a small baseline of the form that DVD-GAN's file has."""
    baseline = tmp_path / "baseline.yaml"
    baseline.write_text(
        (CONFIGS / "dvdgan.yaml").read_text().replace("resolution: 128", "resolution: 8")
        .replace("channels: 128", "channels: 4").replace("channels: 96", "channels: 4")
    )  # fmt: skip
    # A V100 has no bf16, which is the baseline's own precision: compared is in the stage's.
    limits = ["--gpu-memory", "0.2", "--reserve", "0", "--device", "v100"]
    finished = plan("--stage", "1", *limits, "--against", str(baseline))
    assert finished.code == 0, finished.err
    assert "batch 4 = 1 GPU x 4 samples; configured: micro-batch 4, ZeRO-1" in finished.out
    table = [line.split() for line in finished.out.splitlines()]
    assert ["0", "norms"] in [line[:2] for line in table]
    # A bucket of 0.2 GB leaves nothing at ZeRO-1; at ZeRO-0 there is none.
    assert next(line for line in table if line[:2] == ["1", "norms"])[-2:] == ["none", "fits"]
    assert next(line for line in table if line[:2] == ["0", "norms"])[-2:] != ["none", "fits"]
    assert "the project's goal, which is not measured" in finished.out
    assert "dvdgan 1: 8x8/12" in finished.out
    assert "tiny 2: 16x16/4" in finished.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "3"], "--stage 3: tiny has stages 1 to 2"),
        (["--stage", "1", "--gpus", "0"], "--gpus must be at least 1"),
        (["--stage", "1", "--gpus", "2000000000"], "--gpus must be at most 1000000"),
        (
            ["--stage", "2", "--gpus", "2", "--set", "training.global_batch=8000000000003"],
            "--gpus 2 cannot share training.global_batch 8000000000003: more than 100000 samples "
            "for each; use more GPUs, or a smaller --set stages.2.training.global_batch",
        ),
        (["--stage", "1", "--gpus", "3"], "--gpus 3 cannot share training.global_batch 4 evenly"),
        (["--stage", "1", "--device", "tpu"], "--device 'tpu' is not among v100, a100-40, a100"),
        (["--stage", "1", "--hfu", "1.5"], "--hfu is a fraction of the peak"),
        (
            ["--stage", "2", "--set", "stages.2.training.sample_bank={num_videos: 3}"],
            "training.sample_bank.num_videos 3 must be a multiple of 4",
        ),
        (
            [
                *("--stage", "2", "--set", "training.micro_batch=auto", "--gpus", "2"),
                *("--set", "stages.2.training.sample_bank={num_videos: 3}"),
            ],
            "num_videos 3 must be a multiple of 2 (2 processes x micro_batch 1)",
        ),
        (["--stage", "1", "--gpu-memory", "-1"], "--gpu-memory must be more than 0, not -1"),
        (["--stage", "1", "--gpu-memory", "nan"], "--gpu-memory must be more than 0, not nan"),
        (["--stage", "1", "--reserve", "80"], "--reserve 80 leaves nothing of --gpu-memory 80"),
        (["--stage", "1", "--set", "training.micro_batch=3"], "training.global_batch 4 "),
        (["--stage", "1", "--against", "no.yaml"], "no.yaml"),
    ],
)
def test_errors(plan: Plan, arguments: list[str], message: str) -> None:
    assert message in plan(*arguments).error


def test_precision_that_a_device_lacks(plan: Plan) -> None:
    finished = plan("--stage", "1", "--device", "v100", "--set", "training.precision=bf16")
    assert "--device v100 has no bf16" in finished.error
