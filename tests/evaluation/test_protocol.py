"""Protocols: what presets say, what may be changed, and what a fingerprint is of."""

import pytest
from pydantic import ValidationError

from engine.errors import UserError
from engine.evaluation.protocol import PRESETS, EvaluationProtocol, find_protocol


def test_stylegan_vs_are_its_figures() -> None:
    """metric_main.py and frechet_video_distance.py of universome/stylegan-v."""
    main = find_protocol("stylegan-v")
    assert (main.num_frames, main.frame_stride, main.num_videos) == (16, 1, 2048)
    assert (main.real_offset, main.generated_offset) == ("random", "first")
    assert (main.covariance, main.short, main.network_resize) == ("biased", "drop", "half-pixel")
    assert find_protocol("fvd2048_16f").fingerprint() == main.fingerprint()
    assert find_protocol("fvd2048_128f").num_frames == 128
    every_8th = find_protocol("fvd2048_128f_subsample8f")
    assert (every_8th.num_frames, every_8th.source_frames("real")) == (16, 121)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_and_tells_itself(name: str) -> None:
    protocol = find_protocol(name)
    protocol.check_frames()
    assert protocol.lines()[0].startswith(f"protocol {name}: ")
    assert protocol.to_tree()["fingerprint"] == protocol.fingerprint()
    unknown = [line for line in protocol.lines() if line.startswith("  not known: ")]
    assert len(unknown) == len(protocol.unknown)


def test_the_papers_say_what_is_not_known() -> None:
    told = " ".join(find_protocol("paper").unknown)
    for word in ("how many videos", "windows", "resized", "covariances", "Kinetics-600"):
        assert word in told


def test_it_is_frozen_and_every_field_counts() -> None:
    protocol = find_protocol("stylegan-v")
    with pytest.raises(ValidationError):
        protocol.seed = 1
    changes = {
        "resolution": 64,
        "fit": "stretch",
        "num_frames": 17,
        "frame_stride": 2,
        "real_stride": 2,
        "real_offset": "first",
        "generated_offset": "centre",
        "short": "loop",
        "few_frames": "loop",
        "num_videos": 5,
        "network": "other",
        "network_sha256": "1",
        "network_resize": "tf1",
        "covariance": "unbiased",
        "inception_splits": 3,
        "precision_neighbours": 4,
        "density_neighbours": 3,
        "kvd_subset_size": 10,
        "kvd_subsets": 7,
        "psd_frames": (1, 2),
        "psd_sets": 2,
        "psd_radius": "floored",
        "seed": 1,
    }
    of_the_reader = {"name", "unknown", "quantisation"}
    assert changes.keys() == EvaluationProtocol.model_fields.keys() - of_the_reader
    found = {
        protocol.model_copy(update={key: value}).fingerprint() for key, value in changes.items()
    }
    assert len(found | {protocol.fingerprint()}) == len(changes) + 1
    assert protocol.model_copy(update={"name": "x"}).fingerprint() == protocol.fingerprint()


def test_changes_are_told_by_the_name() -> None:
    changed = find_protocol("stylegan-v", ["resolution=64", "psd_frames=[1, 5]"])
    assert (changed.resolution, changed.psd_frames) == (64, (1, 5))
    assert changed.name == "stylegan-v, changed: resolution=64, psd_frames=[1, 5]"


@pytest.mark.parametrize(
    ("name", "change", "line"),
    [
        ("fvd", "seed=1", "no protocol 'fvd'; there are paper, dvdgan, "),
        ("paper", "frames=16", "--set frames=16: there is no such key; there are resolution, "),
        ("paper", "name=mine", "--set name=mine: there is no such key"),
        ("paper", "network_sha256=0", "there is no such key"),
        ("paper", "seed", "--set seed: expected key.path=value"),
        ("paper", "num_frames=0", "--set num_frames=0: input should be greater than or equal to 1"),
        ("paper", "short=shrug", "--set short=shrug: input should be 'error', 'drop' or 'loop'"),
        ("paper", "psd_frames=[0]", "psd_frames are numbered from 1"),
    ],
)
def test_mistakes(name: str, change: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        find_protocol(name, [change])
    assert line in str(caught.value)


def test_fewer_frames_than_the_network_takes() -> None:
    with pytest.raises(UserError, match="clips have 8 frames, and the network needs 9"):
        find_protocol("paper", ["num_frames=8"]).check_frames()
    find_protocol("paper", ["num_frames=8", "few_frames=loop"]).check_frames()
    find_protocol("paper", ["num_frames=9"]).check_frames()
