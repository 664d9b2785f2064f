"""Which decoder a data set gets, and what the user is told of it."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numbered_videos import write_numbered
from small_runs import environment

from engine.errors import UserError
from engine.video import dali_stream, decoder_choice
from engine.video.decoder_choice import choose_decoder
from engine.video.index import VideoIndex
from engine.video.indexing import build_index

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> VideoIndex:
    root = tmp_path_factory.mktemp("videos")
    for codec, width in (("mjpeg", 96), ("mjpeg444", 96), ("vp9", 96), ("h264", 96)):
        for height in (64, 128):
            path = write_numbered(root, codec, num_frames=20, width=width, height=height)
            path.rename(path.with_stem(f"{codec}-{height}"))
    return build_index(root, root / "index.jsonl", num_workers=0, progress=False)[0]


def of(index: VideoIndex, *codecs: str) -> list[int]:
    return [n for n, e in enumerate(index.entries) if e.path.partition("-")[0] in codecs]


def only(index: VideoIndex, *codecs: str) -> VideoIndex:
    entries = tuple(index.entries[video] for video in of(index, *codecs))
    return VideoIndex(index.root, index.classes, entries)


def test_the_cpu_has_one_decoder_for_all(index: VideoIndex) -> None:
    everything = range(len(index.entries))
    for asked in ("auto", "pyav"):
        assert choose_decoder(asked, index, everything, CPU) == ("pyav", "")


def test_what_dali_cannot_decode_is_counted_and_named(index: VideoIndex) -> None:
    problem = r"decoder dali-cpu cannot decode 2 of 4 \(2 h264; e\.g\. h264-128\.mp4\); use decoder"
    with pytest.raises(UserError, match=problem):
        choose_decoder("dali-cpu", index, of(index, "h264", "vp9"), CPU)
    assert choose_decoder("dali-cpu", index, of(index, "mjpeg", "vp9"), CPU) == ("dali-cpu", "")


def test_what_is_no_decoder_is_refused(index: VideoIndex) -> None:
    with pytest.raises(UserError, match="dali-gpu needs a GPU"):
        choose_decoder("dali-gpu", index, [0], CPU)
    with pytest.raises(UserError, match="decoder 'dali': use auto, dali-cpu, dali-gpu, pyav"):
        choose_decoder("dali", index, [0], CPU)


class TestOnAGpu:
    """Its decoder is pretended: what a trial says is given."""

    def test_auto_takes_it(self, index: VideoIndex, monkeypatch: pytest.MonkeyPatch) -> None:
        tried: list[VideoIndex] = []
        monkeypatch.setattr(decoder_choice, "try_dali", lambda *given: tried.append(given[0]))
        used = of(index, "mjpeg", "h264")
        assert choose_decoder("auto", index, used, GPU) == ("dali-gpu", "")
        # The smallest and the largest of each codec.
        assert [[entry.path for entry in samples.entries] for samples in tried] == [
            ["h264-128.mp4", "h264-64.mp4", "mjpeg-128.mkv", "mjpeg-64.mkv"]
        ]

    def test_what_keeps_a_data_set_off_it_is_named(self, index: VideoIndex) -> None:
        chosen, why = choose_decoder("auto", index, of(index, "mjpeg", "mjpeg444"), GPU)
        named = "2 of 4 (2 mjpeg in yuvj444p; e.g. mjpeg444-128.avi)"
        assert (chosen, why) == ("pyav", f"because DALI (GPU) cannot decode {named}")

    @pytest.mark.parametrize("change", [{"matrix": "bt709"}, {"times_number_frames": False}])
    def test_other_colours_and_orders_are_not_for_it(self, change: dict, index: VideoIndex) -> None:
        entries = tuple(replace(entry, **change) for entry in index.entries)
        changed = VideoIndex(index.root, index.classes, entries)
        chosen, why = choose_decoder("auto", changed, of(index, "mjpeg"), GPU)
        assert chosen == "pyav"
        assert "cannot decode 2 of 2 (2 mjpeg" in why

    def test_auto_goes_on_where_a_trial_fails(
        self, index: VideoIndex, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As where a container has no libnvcuvid, or a video is too small for NVDEC."""
        problem = "cannot decode h264-64.mp4: Video is too small in at least one dimension"
        monkeypatch.setattr(decoder_choice, "try_dali", lambda *_: problem)
        used = of(index, "h264")
        chosen, why = choose_decoder("auto", index, used, GPU)
        assert (chosen, why) == ("pyav", f"because DALI (GPU) {problem}")
        with pytest.raises(UserError, match=f"decoder dali-gpu {problem}; use decoder auto"):
            choose_decoder("dali-gpu", index, used, GPU)


class TestTrial:
    """With DALI's CPU decoder, which is the same operator."""

    def test_right_frames_pass(self, index: VideoIndex) -> None:
        assert dali_stream.trial(only(index, "mjpeg", "vp9"), "dali-cpu", CPU) is None

    def test_what_fails_is_named(self, index: VideoIndex) -> None:
        found = dali_stream.trial(only(index, "vp9", "h264"), "dali-cpu", CPU)
        assert found is not None
        assert found.startswith("cannot decode h264-128.mp4: ")
        assert "\n" not in found

    def test_other_frames_are_found(
        self, index: VideoIndex, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        decoded_alone = dali_stream._decoded_alone
        monkeypatch.setattr(
            dali_stream,
            "_decoded_alone",
            lambda path, start, *given: decoded_alone(path, start - 3, *given),
        )
        found = dali_stream.trial(only(index, "mjpeg"), "dali-cpu", CPU)
        assert found is not None
        assert "levels off what PyAV gives" in found

    def test_another_range_is_found(
        self, index: VideoIndex, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As if the frames of a JPEG were taken for limited range."""
        decoded_alone = dali_stream._decoded_alone

        def widened(*given: object) -> np.ndarray:
            frames = decoded_alone(*given).astype(np.float32)  # type: ignore[arg-type]
            return ((frames - 16) * 255 / 219).clip(0, 255).astype(np.uint8)

        monkeypatch.setattr(dali_stream, "_decoded_alone", widened)
        assert "levels off" in str(dali_stream.trial(only(index, "mjpeg"), "dali-cpu", CPU))


def test_a_trial_is_made_once(index: VideoIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run has several loaders of the same videos."""
    tried = []
    monkeypatch.setattr(dali_stream, "trial", lambda *given: tried.append(given))
    decoder_choice.try_dali.cache_clear()
    for _ in range(3):
        choose_decoder("dali-cpu", index, of(index, "vp9"), CPU)
    assert len(tried) == 1
    decoder_choice.try_dali.cache_clear()  # what it says was pretended


def test_a_dali_that_does_not_fit_the_machine_is_one_line(
    index: VideoIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "engine.video.dali_stream", None)
    decoder_choice.try_dali.cache_clear()
    with pytest.raises(UserError, match=r"decoder dali-cpu cannot be loaded: .*; use decoder auto"):
        choose_decoder("dali-cpu", index, of(index, "vp9"), CPU)
    decoder_choice.try_dali.cache_clear()


WITHOUT_DALI = """
import sys
sys.modules["nvidia.dali"] = None  # as where it is not installed
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "nvidia.dali" else found(name, *more)
import torch
import engine.train
from engine.errors import UserError
from engine.video.index import VideoIndex
from engine.video.loader import ClipLoader
index = VideoIndex.load(sys.argv[1])
settings = dict(num_frames=2, frame_stride=1, resolution=64, view_resolution=64, batch_size=2)
clips = ClipLoader(index, **settings)
print(next(clips).video_BTCHW.shape)
clips.close()
gpu = ClipLoader(index, **settings, device=torch.device("cuda"))
print(gpu.description)
try:
    ClipLoader(index, **settings, decoder="dali-cpu")
except UserError as error:
    print(error)
"""


def test_nothing_but_dali_s_decoders_needs_dali(index: VideoIndex) -> None:
    command = [sys.executable, "-c", WITHOUT_DALI, str(Path(index.root, "index.jsonl"))]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    shape, description, error = done.stdout.splitlines()[-3:]
    assert shape == "torch.Size([2, 2, 3, 64, 64])"
    missing = "is not installed (pip install nvidia-dali-cuda130)"
    assert description.endswith(f"via PyAV (CPU), because DALI (GPU) {missing}")
    assert error == f"decoder dali-cpu {missing}; use decoder auto or pyav"
