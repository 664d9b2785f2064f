"""sample.py --random-window: what the last stage makes of one window, as it was trained."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import sample

from engine.dummy_passes import load_trained
from engine.models.norms import fix_norm_statistics
from engine.sampling import _CLIPS
from engine.trainer.checkpoints import find_checkpoint, read_tensors
from engine.trainer.fakes import LatentSource
from engine.trainer.ranks import derived_seed
from engine.video.writing import to_uint8


def test_a_clip_is_of_one_window_of_stage_1_s(cascade_run: Path, tmp_path: Path) -> None:
    options = ["--num", "4", "--random-window", "--format", "npz", "--passes", "2"]
    finished = sample("--checkpoint", cascade_run, "--out", tmp_path, *options)
    assert finished.code == 0, finished.err
    with np.load(tmp_path / "samples.npz") as archive:
        videos, labels = archive["videos"], archive["labels"]
    checkpoint = find_checkpoint(cascade_run)
    config = checkpoint.config()
    cascade = load_trained(checkpoint, torch.device("cpu"))
    first, second = cascade.generators
    kept = read_tensors(tmp_path / "norm-statistics.pt")
    for generator, statistics in zip((first, second), kept["stages"], strict=True):
        fix_norm_statistics(generator, statistics)
    window = config.upsampling(2).num_frames
    assert videos.shape[1] == config.stages[2].num_frames == 2 * window
    starts = []
    for number, (video, label) in enumerate(zip(videos, labels, strict=True)):
        seed = derived_seed(_CLIPS, 0, int(label) + 1, number // 2)
        zs = LatentSource(config, (), seed, torch.device("cpu")).latents(1, 2)
        labels_B = torch.tensor([label])
        clip_BTCHW = first(zs[0], labels_B, config.stages[1].num_frames)
        matching = []
        for start in range(clip_BTCHW.shape[1] - window + 1):
            made = second(zs[1], labels_B, clip_BTCHW[:, start : start + window])
            expected = to_uint8(made)[0].permute(0, 2, 3, 1).numpy().astype(int)
            if abs(expected - video).max() <= 1:
                matching.append(start)
        assert len(matching) == 1
        starts += matching
    assert len(set(starts)) > 1
    assert json.loads((tmp_path / "samples.json").read_text())["frames"] == 2 * window


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--frames", "8"], "--random-window and --frames exclude each other"),
        (["--stages"], "--random-window and --stages exclude each other"),
    ],
    ids=str,
)
def test_what_excludes_it(
    cascade_run: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    finished = sample("--checkpoint", cascade_run, "--out", tmp_path, "--random-window", *options)
    assert finished.code == 2
    assert message in finished.error


def test_a_single_stage_has_none(cascade_run: Path, tmp_path: Path) -> None:
    stage_1 = cascade_run / "stage1"
    finished = sample("--checkpoint", stage_1, "--out", tmp_path, "--random-window")
    assert finished.code == 2
    assert "a single stage upsamples no windows" in finished.error
