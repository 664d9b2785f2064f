"""Executed FLOPs of a Kinetics-600 training step, with resampling folded and as it stands."""

from pathlib import Path

import pytest

import kernels
from engine.configuration import load_config
from engine.planning.counters import FROZEN
from engine.planning.forward_pass import count_forward, count_frozen
from engine.planning.meta_step import MetaStep

CONFIGS = Path(__file__).parents[2] / "configs"


# (stage, time pooled): TFLOP per sample and step; G, spatial, temporal, matching D in GFLOP.
PLAIN = {
    (1, False): (18.76, (3040.4, 74.5, 179.5, 0.0)),
    (1, True): (17.21, (3040.4, 74.5, 68.6, 0.0)),
    (2, False): (12.37, (1611.3, 165.6, 116.6, 25.9)),
    (2, True): (11.30, (1611.3, 165.6, 57.2, 8.6)),
}
FOLDED = {
    (1, False): (16.65, (2734.3, 58.4, 154.3, 0.0)),
    (1, True): (15.12, (2734.3, 58.4, 44.8, 0.0)),
    (2, False): (9.62, (1342.7, 105.2, 80.4, 22.0)),
    (2, True): (8.67, (1342.7, 105.2, 29.2, 5.1)),
}


@pytest.mark.parametrize("time_pooled", [False, True], ids=["time kept", "time pooled"])
@pytest.mark.parametrize("stage_number", [1, 2])
def test_step(stage_number: int, time_pooled: bool) -> None:
    """Both readings of the paper's "average pooling" in volumetric blocks.

    Stage 1 also gains what its ConvGRU leaves out: 55 of the 306 GFLOP in G. The limits are for the
    networks whose plain counts, 17.2 and 11.3, they were set beside: those that pool time.
    """
    key = f"stages.{stage_number}.discriminators.pool_time={str(time_pooled).lower()}"
    config = load_config(CONFIGS / "kinetics600.yaml", [key])
    folded = count_forward(config, stage_number)
    with kernels.use("reference"):
        plain = count_forward(config, stage_number)
    for counted, table in ((plain, PLAIN), (folded, FOLDED)):
        step, networks = table[stage_number, time_pooled]
        assert round(counted.step, 2) == step
        assert tuple(round(gigaflops, 1) for gigaflops in counted) == networks
    if time_pooled:
        assert folded.step <= {1: 15.5, 2: 8.75}[stage_number]


def test_frozen_stages() -> None:
    """Three windows of the frozen stages per sample and step, or a bank's share of a video."""
    # Stage 1's clip of 25 frames; behind its last ConvGRU, at 32x32 pixels, six are wanted.
    kernels_of_frame = 9 * (2 * 512**2 + 512 * 256 + 256**2 + 256 * 3) + 512 * 256
    clip, frame = 2.7343, 2 * 32**2 * kernels_of_frame / 1e12
    bank = "stages.{}.training.sample_bank={{num_videos: 65_536, refresh_every: 1000}}".format
    share = 65_536 / 1000 / 512
    anew = "stages.{}.training.sample_bank=null".format
    kinetics = load_config(CONFIGS / "kinetics600.yaml", [anew(2)])
    assert count_frozen(kinetics, 2) == pytest.approx(3 * (clip - 19 * frame), rel=1e-4)
    banked = load_config(CONFIGS / "kinetics600.yaml", [bank(2)])
    assert count_frozen(banked, 2) == pytest.approx(share * clip, rel=1e-4)
    # Stage 3's windows are of a video that stage 2 makes of a window.
    video = clip - 19 * frame + 0.3777
    config = load_config(CONFIGS / "bdd100k.yaml", [anew(3)])
    assert count_frozen(config, 3) == pytest.approx(3 * video, rel=1e-4)
    reused = load_config(CONFIGS / "bdd100k.yaml", [anew(3), "training.reuse_fakes=true"])
    assert count_frozen(reused, 3) == pytest.approx(2 * video, rel=1e-4)
    banked = load_config(CONFIGS / "bdd100k.yaml", [bank(3)])
    assert count_frozen(banked, 3) == pytest.approx(share * video, rel=1e-4)


@pytest.mark.parametrize("bank", ["null", "{num_videos: 64, refresh_every: 8}"])
def test_a_step_counts_whole_videos_for_a_bank_only(bank: str) -> None:
    keys = [
        f"stages.2.training.sample_bank={bank}",
        # As the paper's step, which generates three times.
        "training.reuse_fakes=false",
        "training.discriminator_steps=2",
    ]
    config = load_config(CONFIGS / "sample.yaml", keys)
    update = MetaStep(config, 2).run().updates["D"]
    counted = update.flops[FROZEN] / config.stages[2].training.samples_per_pass / 1e12
    videos = 3.0 if bank == "null" else 64 / 8 / config.stages[2].training.global_batch
    assert counted == pytest.approx(count_frozen(config, 2) / videos, rel=1e-6)


@pytest.mark.parametrize(("stage_number", "teraflops"), [(1, 19.25), (2, 10.79)])
def test_blocks_are_computed_again_up_to_their_last_convolution(
    stage_number: int, teraflops: float
) -> None:
    """To their ends they would come to 20.28 and 11.59, as a GPU computes; norms: 16.65, 9.61."""
    keys = [f"stages.{stage_number}.training.{key}" for key in ("checkpointing", "micro_batch")]
    values = [f"{key}={value}" for key, value in zip(keys, ("blocks", 2), strict=True)]
    with kernels.meta_as("cuda"):
        config = load_config(CONFIGS / "kinetics600.yaml", values)
        updates = MetaStep(config, stage_number).run().updates
    per_sample = {
        name: (update.flops["forward"] + update.flops["backward"]) / 2e12
        for name, update in updates.items()
    }
    assert round(2 * per_sample["D"] + per_sample["G"], 2) == teraflops
