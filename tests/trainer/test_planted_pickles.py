"""No file of a checkpoint is executed: pickles that were planted among the tensors are refused."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import forge_meta
from small_runs import Tiny, differences, sample
from test_checkpoints import D_SHARD, FILES, newest

from engine.trainer.checkpoints import read_tensors, sha256


class Planted:
    """Unpickling this creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def plant(file: Path, marker: Path, form: str) -> None:
    """A pickle among the tensors, as torch.save or as a bare pickle."""
    if form == "torch":
        with torch.serialization.safe_globals([]):
            state = torch.load(file, weights_only=False)
        torch.save({**state, "planted": Planted(marker)}, file)
    else:
        file.write_bytes(pickle.dumps(Planted(marker)))


def forge(checkpoint: Path) -> None:
    """Make the hashes match what the files hold now."""

    def match(meta: dict[str, Any]) -> None:
        for name in meta["files"]:
            file = checkpoint / name
            meta["files"][name] = [file.stat().st_size, sha256(file)]
        if meta["previous"]:
            meta["previous"] = sha256(checkpoint.parent.parent / "previous.pt")

    forge_meta(checkpoint, match)


def test_the_planted_object_works(tmp_path: Path) -> None:
    """Else the tests below could not fail."""
    torch.save({}, tmp_path / "x.pt")
    plant(tmp_path / "x.pt", tmp_path / "marker", "torch")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("form", ["torch", "bare"])
@pytest.mark.parametrize(
    ("zero_stage", "name"), [(0, D_SHARD), (0, "rank-00000.pt"), *((1, name) for name in FILES)]
)
def test_no_file_is_executed_when_resuming(
    tiny: Tiny, tmp_path: Path, name: str, form: str, zero_stage: int
) -> None:
    marker = tmp_path / "executed"
    more = ("--set", f"training.zero_stage={zero_stage}", "--set", "training.ema_decay=0.5")
    checkpoint = tiny.trained(1, tmp_path, "--max-steps", "1", *more)
    plant(checkpoint / name, marker, form)
    assert "no undamaged checkpoint" in tiny.train(1, tmp_path, *more).error
    forge(checkpoint)
    assert f"{name} is not a file of tensors" in tiny.train(1, tmp_path, *more).error
    assert not marker.exists()


@pytest.mark.parametrize("form", ["torch", "bare"])
def test_no_file_is_executed_when_freezing_the_previous_stage(
    tiny: Tiny, run: Path, tmp_path: Path, form: str
) -> None:
    marker = tmp_path / "executed"
    plant(newest(run) / "generator.pt", marker, form)
    forge(newest(run))
    error = tiny.train(2, tmp_path / "new", "--previous", run).error
    assert "generator.pt is not a file of tensors" in error
    assert not marker.exists()


@pytest.mark.parametrize("form", ["torch", "bare"])
@pytest.mark.parametrize("name", ["previous.pt", "checkpoints/step-00000002/generator.pt"])
def test_no_file_is_executed_when_sampling_or_going_on(
    tiny: Tiny, run: Path, tmp_path: Path, name: str, form: str
) -> None:
    marker = tmp_path / "executed"
    plant(run / "stage2" / name, marker, form)
    forge(newest(run, 2))
    error = sample("--checkpoint", run, "--out", tmp_path / "samples").error
    assert f"{Path(name).name} is not a file of tensors" in error
    if "previous" in name:
        assert "previous.pt is not a file" in tiny.train(2, run, "--max-steps", "3").error
    assert not marker.exists()


def test_kept_statistics_are_not_executed(run: Path, tmp_path: Path) -> None:
    marker, out = tmp_path / "executed", tmp_path / "samples"
    assert sample("--checkpoint", run, "--out", out).code == 0
    plant(out / "norm-statistics.pt", marker, "torch")
    assert "norm-statistics.pt" in sample("--checkpoint", run, "--out", out).error
    assert not marker.exists()


def test_read_tensors_reads_tensors(tmp_path: Path) -> None:
    value = {"a": [torch.arange(3), 1, "x"], "b": None}
    torch.save(value, tmp_path / "x.pt")
    assert differences(read_tensors(tmp_path / "x.pt"), value) == []
