"""Controls and verdicts: a metric that sees damage says so, and one that does not is blind."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from plain_network import PlainNetwork

from engine.errors import UserError
from engine.evaluation.bootstrap import centred_interval
from engine.evaluation.controls import Controls, blind_to, controls_tree, difference, verdict
from engine.evaluation.evaluation import Evaluation, evaluate, figure
from engine.evaluation.metric_definitions import METRICS, Measurement, find_metrics
from engine.evaluation.protocol import EvaluationProtocol
from engine.evaluation.video_sources import ArchivedVideos
from engine.video.procedural import render_clip

PROTOCOL = EvaluationProtocol(
    name="test", num_frames=12, inception_splits=2, psd_frames=(1, 10), covariance="unbiased"
)


def videos(num: int, seed: int, side: int = 16) -> NDArray[np.uint8]:
    return np.stack([render_clip(n % 8, seed, n // 8, 14, side) for n in range(num)])


def evaluated(
    generated: NDArray[np.uint8], cache: Path, num_real: int = 64, **changes: Any
) -> Evaluation:
    return evaluate(
        ArchivedVideos("real", videos(num_real, 0)),
        ArchivedVideos("generated", generated),
        PROTOCOL.model_copy(update=changes),
        find_metrics(None),
        PlainNetwork(),
        cache,
        num_resamples=60,
    )


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """Videos of the real distribution."""
    return evaluated(videos(32, 1), tmp_path_factory.mktemp("features"))


def by_name(found: Evaluation) -> dict[str, Any]:
    return {row.metric.name: row for row in found.rows}


def test_every_metric_is_measured_beside_its_controls(good: Evaluation) -> None:
    assert set(by_name(good)) == set(METRICS)
    for row in good.rows:
        assert row.measurement is not None, row
        assert row.controls is not None, row
        assert (
            row.measurement.interval.low <= row.measurement.value <= row.measurement.interval.high
        )
        sizes = {(each.num_reference, each.num_candidates) for each in row.controls}
        assert sizes == {(32, 32)}
        assert (row.measurement.num_reference, row.measurement.num_candidates) == (64, 32)


def test_what_sees_motion_sees_the_controls_and_spectra_are_blind(good: Evaluation) -> None:
    """The plain network sees steps between frames. Spectra of frames cannot see their order, and
    frame 1 is the frozen one.
    """
    rows = by_name(good)
    for name in ("motion", "persistence", "fvd", "fid-k400", "kvd"):
        assert blind_to(rows[name].metric, rows[name].controls) == [], name
        assert "not told from real clips" in rows[name].note, name
    assert rows["psd"].note == "blind here"
    frozen, real = rows["motion"].controls.frozen, rows["motion"].controls.real
    assert frozen.value == 0
    assert real.value == pytest.approx(1, abs=0.3)


def test_spoilt_clips_are_told_from_real_ones(tmp_path: Path) -> None:
    still = videos(32, 1)
    still[:] = still[:, :1]
    rows = by_name(evaluated(still, tmp_path))
    assert rows["motion"].measurement.value == 0
    assert rows["motion"].note == "worse than real, no better than frozen"
    assert "worse than real" in rows["fvd"].note
    assert rows["fvd"].controls.generated.value > 3 * rows["fvd"].controls.real.value


def measurement(value: float, spread: float = 0.1, seed: int = 0) -> Measurement:
    drawn = value + spread * np.random.default_rng(seed).normal(size=400)
    return Measurement(value, centred_interval(drawn, value), 9, 9, "logits", {}, drawn)


@pytest.mark.parametrize(
    ("name", "real", "shuffled", "frozen", "generated", "expected"),
    [
        ("fvd", 1, 2, 3, 1, "not told from real clips"),
        ("fvd", 1, 2, 3, 1.5, "worse than real, better than spoilt clips"),
        ("fvd", 1, 2, 3, 2.5, "worse than real, no better than shuffled"),
        ("fvd", 1, 2, 3, 9, "worse than real, no better than shuffled or frozen"),
        ("fvd", 1, 1, 3, 1, "blind here to shuffled frames; not told from real clips"),
        ("fvd", 1, 1, 0, 9, "blind here; worse than real all the same"),
        ("fvd", 1, 1, 0, 1, "blind here"),
        ("precision", 0.9, 0.5, 0.1, 0.9, "not told from real clips"),
        ("precision", 0.9, 0.95, 0.95, 0.9, "blind here"),
        ("motion", 1, 3, 0, 1.01, "not told from real clips"),
        ("motion", 1, 3, 0, 1.9, "worse than real, better than spoilt clips"),
        ("motion", 1.5, 1.2, 0.8, 1.4, "blind here"),
    ],
)  # fmt: skip
def test_verdicts(
    name: str, real: float, shuffled: float, frozen: float, generated: float, expected: str
) -> None:
    """Values 0.01 sure; "motion" is best at 1, precision high."""
    values = {"real": real, "shuffled": shuffled, "frozen": frozen, "generated": generated}
    controls = Controls(**{key: measurement(value, 0.01) for key, value in values.items()})
    assert verdict(METRICS[name], controls) == expected


def test_differences_are_paired() -> None:
    """Of resamples that move together the difference is sure, though neither value is."""
    real, paired = measurement(1, spread=5, seed=1), measurement(1.5, spread=5, seed=1)
    unpaired = measurement(1.5, spread=5, seed=2)
    assert difference(METRICS["fvd"], paired, real).low == pytest.approx(0.5)
    assert difference(METRICS["fvd"], unpaired, real).low < 0
    controls = Controls(real, paired, unpaired, real)
    tree = controls_tree(METRICS["fvd"], controls)
    assert tree["blind_to"] == ["a frozen frame"]
    assert tree["worse_than_real_by"]["shuffled"]["low"] == pytest.approx(0.5)


def test_too_few_real_videos_for_controls(tmp_path: Path) -> None:
    found = evaluated(videos(8, 1), tmp_path, num_real=3)
    rows = by_name(found)
    assert rows["fvd"].controls is None
    assert rows["fvd"].note == "no controls: too few real videos"
    assert rows["precision"].note == (
        "not measured: the 3 nearest neighbours need 4 clips or more in each set, not 3 and 8"
    )
    lines = [line.split() for line in found.table().splitlines()]
    (fvd,) = (line for line in lines if line[:1] == ["fvd"])
    assert fvd[5:9] == ["-"] * 4


def test_a_number_of_videos_takes_as_many_more_real_ones(tmp_path: Path) -> None:
    found = evaluated(videos(32, 1), tmp_path, num_videos=16)
    row = by_name(found)["fvd"]
    assert [len(selection.clips) for selection in found.selections] == [32, 16]
    assert (row.measurement.num_reference, row.measurement.num_candidates) == (16, 16)
    assert row.controls.generated.value == row.measurement.value


def test_the_table_and_the_file_say_the_same(good: Evaluation) -> None:
    tree, table = good.to_tree(), good.table()
    assert tree["protocol"]["fingerprint"] == good.protocol.fingerprint()
    assert tree["protocol"]["network_sha256"] == "0" * 64
    for metric in tree["metrics"]:
        (line,) = (each for each in table.splitlines() if each.startswith(f"{metric['metric']} "))
        cells = line.split()
        assert cells[1] == figure(metric["measurement"]["value"])
        assert cells[6] == figure(metric["controls"]["real"]["value"])
        assert line.endswith(metric["verdict"])
    spectra = tree["spectra"]
    assert spectra["frames"] == [1, 10]
    assert len(spectra["real"]["mean"][0]) == 9
    assert (spectra["real"]["num_sets"], spectra["generated"]["num_clips"]) == (3, 32)


def test_figures_have_four_digits() -> None:
    shown = [figure(value) for value in (0.0, 0.12345, 1.5, 12.345, -123.456, 1402.4, 2e-5)]
    assert shown == ["0.000", "0.123", "1.500", "12.35", "-123.5", "1402", "2.0e-05"]


def test_which_metrics() -> None:
    assert [metric.name for metric in find_metrics("kvd, fvd,kvd")] == ["kvd", "fvd"]
    with pytest.raises(UserError, match="--metric 'fid' is none of fvd, fid-k400"):
        find_metrics("fvd,fid")
