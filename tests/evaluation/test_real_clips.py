"""Which real clips a report compares with, and that they are what the videos hold."""

from pathlib import Path

import pytest
import torch
from small_runs import Tiny

from engine.configuration import Config, ProceduralClips
from engine.errors import UserError
from engine.evaluation import real_clips
from engine.evaluation.real_clips import (
    ClipShape,
    RealVideos,
    find_real_videos,
    reference_halves,
    training_clips,
)
from engine.video.index import VideoIndex
from engine.video.procedural import ensure_procedural

SHAPE = ClipShape(num_frames=6, frame_stride=1, resolution=16)
CPU = torch.device("cpu")


def data_set(folder: Path, num_clips: int, num_classes: int = 2, seed: int = 0) -> Path:
    settings = ProceduralClips(num_clips=num_clips, num_frames=16, resolution=16, seed=seed)
    return ensure_procedural(folder, settings, num_classes)


def of_files(tiny: Tiny, path: Path, *more: str) -> Config:
    config = tiny.config(*more)
    data = config.data.model_copy(update={"path": str(path), "procedural": None})
    return config.model_copy(update={"data": data})


def find(config: Config, classes: list[str], num: int, held_out: Path | None = None) -> RealVideos:
    return find_real_videos(
        config,
        classes,
        num_source_frames=SHAPE.num_source_frames,
        num_per_class=num,
        held_out_path=str(held_out) if held_out else None,
        seed=0,
        say=print,
    )


def files(index: VideoIndex) -> set[Path]:
    return {index.path(number) for number in range(len(index.entries))}


def test_the_sample_sets_held_out_clips_are_another_seeds(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config(f"data.path={tmp_path / 'data'}")
    found = find(config, ["bouncing circle", "rotating square"], num=2)
    beside = VideoIndex.load(tmp_path / "data-held-out/index.jsonl")
    trained_on = VideoIndex.load(tmp_path / "data/index.jsonl")
    assert files(found.reference) == files(beside)
    assert files(found.training) == files(trained_on)
    assert (found.fingerprint, found.held_out_fingerprint, found.note) == (
        trained_on.fingerprint(),
        beside.fingerprint(),
        "",
    )
    digests = [{entry.sha256 for entry in index.entries} for index in (beside, trained_on)]
    assert not digests[0] & digests[1]


def test_without_held_out_clips_the_classifiers_learn_from_others(
    tiny: Tiny, tmp_path: Path
) -> None:
    config = of_files(tiny, data_set(tmp_path / "data", 26))
    found = find(config, ["bouncing circle", "rotating square"], num=2)
    assert "of the training data itself" in found.note
    assert found.held_out_fingerprint is None
    assert not files(found.reference) & files(found.training)
    labels = [entry.label for entry in found.reference.entries]
    assert labels == [0] * 4 + [1] * 4
    assert len(files(found.reference) | files(found.training)) == 26
    # Half of 13 is enough for two halves of three, not of eight.
    assert len(find(config, ["bouncing circle", "rotating square"], num=8).reference.entries) == 12


def test_classes_go_by_their_names(tiny: Tiny, tmp_path: Path) -> None:
    """Numbers are the checkpoint's: here the second folder's is 0, and that of the first 2."""
    config = of_files(tiny, data_set(tmp_path / "data", 8))
    held_out = data_set(tmp_path / "other", 8, seed=5)
    found = find(config, ["rotating square", "spare", "bouncing circle"], 2, held_out)
    for index in (found.reference, found.training):
        folders = {entry.label: Path(entry.path).parts[0] for entry in index.entries}
        assert folders == {0: "rotating square", 2: "bouncing circle"}
    assert found.classes == [0, 2]
    with pytest.raises(UserError, match="has the class 'rotating square', which the checkpoint"):
        find(config, ["bouncing circle"], 2, held_out)


def test_a_class_without_pairs_is_left_out(tiny: Tiny, tmp_path: Path) -> None:
    """The held-out data has four clips of the first class and three of the second."""
    config = of_files(tiny, data_set(tmp_path / "data", 8))
    held_out = data_set(tmp_path / "other", 7, seed=5)
    found = find(config, ["bouncing circle", "rotating square"], 2, held_out)
    assert found.classes == [0]
    assert found.note == "1 of 2 classes are compared"
    assert {entry.label for entry in found.training.entries} == {0}
    with pytest.raises(UserError, match=r"too few videos in .*data to compare with: 8 of a class"):
        find(config, ["bouncing circle", "rotating square"], 2)


def test_no_more_classes_and_clips_than_memory_is_for(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_clips, "MAX_CLASSES", 2)
    monkeypatch.setattr(real_clips, "MAX_TRAINING_CLIPS", 6)
    config = of_files(tiny, data_set(tmp_path / "data", 40, 4))
    classes = [path.name for path in (tmp_path / "data").iterdir() if path.is_dir()]
    found = find(config, classes, num=2)
    assert found.classes == [0, 2]
    assert len(found.training.entries) == 6


def test_halves_are_of_other_videos_and_hold_what_those_hold(tiny: Tiny, tmp_path: Path) -> None:
    """Each clip is a window of one of its class's videos, as PyAV decodes them, and of one only."""
    config = of_files(tiny, data_set(tmp_path / "data", 8), "data.decoder=pyav")
    held_out = data_set(tmp_path / "other", 8, seed=5)
    found = find(config, ["bouncing circle", "rotating square"], 2, held_out)
    halves = reference_halves(found, config, SHAPE, CPU, seed=0)

    windows = {}
    for number, entry in enumerate(found.reference.entries):
        alone = VideoIndex(found.reference.root, (), (entry,))
        loader = real_clips.ClipLoader(
            alone,
            num_frames=16,
            frame_stride=1,
            resolution=16,
            view_resolution=16,
            batch_size=1,
            decoder="pyav",
        )
        whole = next(loader).video_BTCHW[0]
        loader.close()
        for start in range(11):
            windows[number, start] = whole[start : start + 6]
    seen = set()
    for half in halves:
        assert half.labels_B is not None
        assert half.labels_B.tolist() == [0, 0, 1, 1]
        for clip, label in zip(half.video_BTCHW, half.labels_B.tolist(), strict=True):
            (number,) = {n for (n, _), window in windows.items() if torch.equal(window, clip)}
            assert found.reference.entries[number].label == label
            seen.add(number)
    assert len(seen) == 8

    video, labels = training_clips(found, config, SHAPE, CPU, seed=0)
    assert labels.bincount().tolist() == [4, 4]
    assert video.abs().max() > 0


def test_without_classes(tiny: Tiny, tmp_path: Path) -> None:
    config = of_files(tiny, data_set(tmp_path / "data", 24), "data.num_classes=null")
    found = find(config, [], num=3)
    halves = reference_halves(found, config, SHAPE, CPU, seed=0)
    assert [len(half.video_BTCHW) for half in halves] == [3, 3]
    assert [half.labels_B for half in halves] == [None, None]
