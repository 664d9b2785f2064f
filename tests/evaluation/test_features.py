"""Features: in batches, in shards, over ranks, from the cache and never from a wrong one."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from plain_network import PlainNetwork
from torch import Tensor

from engine.errors import UserError
from engine.evaluation import features
from engine.evaluation.clips import Selection, View, choose_clips, read_clip, viewed
from engine.evaluation.features import Features, extract, features_of_clips, merge
from engine.evaluation.i3d import Placing
from engine.evaluation.protocol import EvaluationProtocol
from engine.evaluation.video_sources import ArchivedVideos
from engine.video.procedural import render_clip

NUM = 11
PROTOCOL = EvaluationProtocol(name="test", num_frames=6)


def selection(
    videos_NTHWC: NDArray[np.uint8] | None = None, protocol: EvaluationProtocol = PROTOCOL
) -> Selection:
    if videos_NTHWC is None:
        videos_NTHWC = np.stack([render_clip(n % 8, 0, n, 8, 16) for n in range(NUM)])
    return choose_clips(ArchivedVideos("memory", videos_NTHWC), "real", protocol, None)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "CLIPS_PER_SHARD", 4)


def computed(cache: Path, view: View = "plain", chosen: Selection | None = None) -> Features:
    chosen = chosen or selection()
    network = PlainNetwork()
    given = (chosen, range(len(chosen.clips)), view, PROTOCOL, network, cache)
    extract(*given, batch_size=3)
    return merge(*given)


def test_they_are_the_networks_of_each_clip_in_order(tmp_path: Path) -> None:
    chosen = selection()
    for view in ("plain", "shuffled", "frozen"):
        found = computed(tmp_path, view, chosen)
        for number, clip in enumerate(chosen.clips):
            frames = read_clip(chosen.source, clip, PROTOCOL)
            shown = torch.from_numpy(viewed(frames, view, clip.digest, PROTOCOL.seed).copy())
            expected = PlainNetwork()(shown[None], "tf1")["logits"][0]
            np.testing.assert_array_equal(found["logits"][number], expected.numpy())
        assert found["motion"].shape == (NUM, 1)
    assert computed(tmp_path, "frozen")["motion"].max() == 0


def test_nothing_is_computed_twice(tmp_path: Path) -> None:
    chosen, network = selection(), PlainNetwork()
    given = (chosen, range(NUM), "plain", PROTOCOL, network, tmp_path)
    first = extract(*given, batch_size=3)  # type: ignore[arg-type]
    assert (first.num_computed, first.num_cached) == (NUM, 0)
    assert max(shape[0] for shape in network.shown) == 3  # memory holds a batch
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3
    # Interrupted: one shard is not there.
    files[1].unlink()
    second = extract(*given, batch_size=3)  # type: ignore[arg-type]
    assert second.num_cached == NUM - second.num_computed > 0
    assert sorted(tmp_path.iterdir()) == files
    # Damaged: computed again, to the same bits.
    whole = files[0].read_bytes()
    for damaged in (whole[:-5], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        files[0].write_bytes(damaged)
        assert extract(*given, batch_size=3).num_computed > 0  # type: ignore[arg-type]
        assert files[0].read_bytes() == whole


def test_another_protocol_network_view_or_content_finds_nothing(tmp_path: Path) -> None:
    chosen, network = selection(), PlainNetwork()
    extract(chosen, range(NUM), "plain", PROTOCOL, network, tmp_path)
    other_network = PlainNetwork()
    other_network.sha256 = "1" * 64
    other_videos = np.stack([render_clip(n % 8, 1, n, 8, 16) for n in range(NUM)])
    other_protocol = PROTOCOL.model_copy(update={"seed": 3})
    for case in (
        (chosen, "plain", other_protocol, network),
        (chosen, "plain", PROTOCOL, other_network),
        (chosen, "plain", PROTOCOL, None),
        (chosen, "shuffled", PROTOCOL, network),
        (selection(other_videos), "plain", PROTOCOL, network),
    ):
        done = extract(case[0], range(NUM), *case[1:], tmp_path)  # type: ignore[arg-type, call-arg]
        assert (done.num_computed, done.num_cached) == (NUM, 0)
    # The same content elsewhere, under other names, is found.
    again = extract(selection(), range(NUM), "plain", PROTOCOL, network, tmp_path)
    assert again.num_cached == NUM


def test_two_ranks_make_what_one_makes(tmp_path: Path) -> None:
    chosen, network = selection(), PlainNetwork()
    given = (chosen, range(NUM), "plain", PROTOCOL, network, tmp_path / "two")
    first = extract(*given, rank=0, world_size=2)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"shard 1 of 3 .* has not finished"):
        merge(*given)  # type: ignore[arg-type]
    second = extract(*given, rank=1, world_size=2)  # type: ignore[arg-type]
    assert (first.num_computed, second.num_computed) == (7, 4)
    together = merge(*given)  # type: ignore[arg-type]
    alone = computed(tmp_path / "one", chosen=chosen)
    assert together.keys() == alone.keys()
    for name in alone:
        np.testing.assert_array_equal(together[name], alone[name])


def test_iterables_of_clips_need_no_files() -> None:
    clips = [render_clip(n, 0, n, 6, 16) for n in range(5)]
    found = features_of_clips(iter(clips), PROTOCOL, PlainNetwork(), batch_size=2)
    whole = features_of_clips(clips, PROTOCOL, PlainNetwork(), batch_size=5)
    for name in whole:
        np.testing.assert_allclose(found[name], whole[name], rtol=1e-6)
    assert set(features_of_clips(clips, PROTOCOL, None)) == {"motion", "steps", "spectra"}
    with pytest.raises(ValueError, match="no clips"):
        features_of_clips([], PROTOCOL, None)


def test_few_frames_start_again_for_the_network_only() -> None:
    network = PlainNetwork(least_frames=9)
    clips = [render_clip(n, 0, n, 6, 16) for n in range(2)]
    with pytest.raises(UserError, match="the network needs 9"):
        features_of_clips(clips, PROTOCOL, network)
    looping = PROTOCOL.model_copy(update={"few_frames": "loop"})
    found = features_of_clips(clips, looping, network)
    assert network.shown == [[2, 9, 16, 16, 3]]
    again = np.stack(clips)[:, [0, 1, 2, 3, 4, 5, 0, 1, 2]]
    expected = PlainNetwork()(torch.from_numpy(again), "tf1")["logits"]
    np.testing.assert_array_equal(found["logits"], expected.numpy())
    short = features_of_clips(clips, PROTOCOL, None)
    np.testing.assert_array_equal(found["motion"], short["motion"])


class Broken(PlainNetwork):
    """Gives NaN for the last clip of a batch of two."""

    def __call__(self, clips_BTHWC: Tensor, resize: Placing) -> dict[str, Tensor]:
        layers = super().__call__(clips_BTHWC, resize)
        if len(clips_BTHWC) == 2:
            layers["logits"][1, 0] = math.nan
        return layers


def test_features_that_are_not_finite_name_the_clip(tmp_path: Path) -> None:
    chosen = selection()
    name = chosen.source.names[chosen.clips[NUM - 1].number]
    # Shards of 4, 4 and 3; batches of 4 but the last, of 3: of 2 with batches of 2.
    with pytest.raises(UserError) as caught:
        extract(chosen, range(9, NUM), "plain", PROTOCOL, Broken(), tmp_path, batch_size=2)
    assert f"the network's logits of {name} are not finite" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
