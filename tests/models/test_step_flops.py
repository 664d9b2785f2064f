"""Executed FLOPs of a Kinetics-600 training step, with resampling folded and as it stands."""

from pathlib import Path

import pytest

import kernels
from benchmarks.accounting import count_forward
from engine.configuration import Config, load_config
from engine.models import blocks

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(CONFIGS / "kinetics600.yaml")


@pytest.fixture(params=["time kept", "time pooled"])
def time_pooled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both readings of the paper's "average pooling": volumetric blocks that keep time, as ours
    do, and those that halve it, which an earlier, independent count assumed."""
    pooled = request.param == "time pooled"
    if pooled:
        monkeypatch.setattr(blocks, "VOLUMETRIC_POOLING", (2, 2, 2))
    return pooled


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


@pytest.mark.parametrize("stage_number", [1, 2])
def test_step(
    config: Config, stage_number: int, time_pooled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage 1 also gains what its ConvGRU leaves out: 55 of the 306 GFLOP in G."""
    folded = count_forward(config, stage_number)
    with kernels.use("reference"):
        monkeypatch.setattr(kernels, "conv_gru", kernels.conv_gru_reference)
        plain = count_forward(config, stage_number)
    for counted, table in ((plain, PLAIN), (folded, FOLDED)):
        step, networks = table[stage_number, time_pooled]
        assert round(counted.step, 2) == step
        assert tuple(round(gigaflops, 1) for gigaflops in counted) == networks
