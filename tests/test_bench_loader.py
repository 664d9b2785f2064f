"""The loader's benchmark: its clock, and that its parts handle the same clips."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import loading
from benchmarks.loading import Source, pace
from benchmarks.setups import CONFIGS
from engine.configuration import load_config
from engine.video.streams import Decoder
from engine.views import nearest_view


def test_pace_is_of_what_comes_after_the_batches_made_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pulls of 3 clips: the first four are slow; then they take 0.6 s, in turns 0.5 and 0.7."""
    clock = {"wall": 0.0, "cpu": 0.0, "pulls": 0.0}
    monkeypatch.setattr(time, "perf_counter", lambda: clock["wall"])
    monkeypatch.setattr(time, "process_time", lambda: clock["cpu"])

    def pull() -> None:
        clock["pulls"] += 1
        slow = clock["pulls"] <= 4
        clock["wall"] += 100 if slow else 0.5 + 0.2 * (clock["pulls"] % 2)
        clock["cpu"] += 100 if slow else 0.9

    seconds, cpu_seconds = pace(pull, batch_size=3, seconds=0, least_rounds=2)
    assert seconds == pytest.approx([0.2, 0.2])
    assert cpu_seconds == pytest.approx(0.3)
    assert clock["pulls"] == 4 + 2 * 2
    seconds, _ = pace(pull, batch_size=3, seconds=3, least_rounds=2)
    assert len(seconds) == 3  # rounds of 1.2 s


@pytest.mark.parametrize(
    ("codec", "decoder"), [("mjpeg", "dali-cpu"), ("vp9", "dali-cpu"), ("h264", "pyav")]
)
def test_parts_handle_the_same_clips(tmp_path: Path, codec: str, decoder: Decoder) -> None:
    """Bit for bit, where resizing and cropping have nothing to do: 64x64 as the last stage's."""
    index = loading.write_video(tmp_path / "videos", codec, 64, 64, 30)
    assert [entry.codec for entry in index.entries] == [codec]
    config = load_config(CONFIGS / "sample.yaml", ["training.micro_batch=2"])
    source = Source(config, 2, index, decoder, 1, torch.device("cpu"))
    batches: dict[str, Any] = {}
    for name, part in loading.PARTS.items():
        with part(source) as pull:
            pull()
            batches[name] = pull()
    decoded = batches["decode"]
    if decoder == "dali-cpu":
        decoded = decoded[0].as_array()
    requests, clips = batches["pipeline"].requests, batches["pipeline"].clips_BTHWC
    assert [request.number for request in requests] == [2, 3]
    np.testing.assert_array_equal(np.stack(list(decoded)), clips.numpy())
    assert not torch.equal(clips[0], clips[1])
    view = nearest_view(clips.permute(0, 1, 4, 2, 3), resolution=32)
    assert torch.equal(view / 127.5 - 1, batches["loader"].video_BTCHW)
