"""sample.py --as-dataset: clips for other evaluators, which a stopped run goes on with."""

import csv
import hashlib
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_runs import sample

from engine import sampled_dataset
from engine.export import main as export
from engine.sampled_dataset import draw_labels
from engine.sampling import interpolate


def dataset(checkpoint: Path, out: Path, num: int, *options: str) -> Any:
    made = ["--as-dataset", str(num), *options]
    return sample("--checkpoint", checkpoint, "--out", out, *made)


def hashes(out: Path) -> dict[str, str]:
    files = sorted(path for path in (out / "clips").rglob("*") if path.is_file())
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


@pytest.mark.parametrize("form", ["mp4", "png"])
def test_a_stopped_run_goes_on(
    cascade_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    finished = dataset(cascade_run, whole, 5, "--format", form)
    assert finished.code == 0, finished.err
    written = 0
    name = {"mp4": "mp4_file", "png": "write_pngs"}[form]
    write = getattr(sampled_dataset, name)

    def write_three(*arguments: Any) -> Any:
        nonlocal written
        written += 1
        if written == 4:
            raise KeyboardInterrupt
        return write(*arguments)

    monkeypatch.setattr(sampled_dataset, name, write_three)
    assert dataset(cascade_run, stopped, 5, "--format", form).code == 130
    monkeypatch.undo()
    assert not (stopped / "labels.csv").exists()
    finished = dataset(cascade_run, stopped, 5, "--format", form)
    assert "wrote: 2 clips" in finished.out
    assert "3 were there" in finished.out
    assert hashes(stopped) == hashes(whole)
    assert (stopped / "labels.csv").read_text() == (whole / "labels.csv").read_text()


def test_clips_can_be_added(cascade_run: Path, tmp_path: Path) -> None:
    assert dataset(cascade_run, tmp_path, 2).code == 0
    before = hashes(tmp_path)
    assert "wrote: 2 clips" in dataset(cascade_run, tmp_path, 4).out
    after = hashes(tmp_path)
    assert before.items() < after.items()
    with (tmp_path / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == sorted(after, key=lambda path: Path(path).stem)
    assert all(row["class"] == Path(row["path"]).parent.name for row in rows)
    assert "wrote: 0 clips" in dataset(cascade_run, tmp_path, 4).out


def test_another_plan_is_refused(cascade_run: Path, tmp_path: Path) -> None:
    assert dataset(cascade_run, tmp_path, 1).code == 0
    before = hashes(tmp_path)
    for options, key in ((("--seed", "1"), "seed"), (("--frames", "8"), "frames")):
        finished = dataset(cascade_run, tmp_path, 1, *options)
        assert finished.code == 2
        assert f"is of clips with another {key}" in finished.error
    (tmp_path / "dataset.json").write_text("{")
    assert "dataset.json is damaged" in dataset(cascade_run, tmp_path, 1).error
    (tmp_path / "dataset.json").unlink()
    assert "clips is not sample.py's" in dataset(cascade_run, tmp_path, 1).error
    assert hashes(tmp_path) == before


def test_classes_come_as_often_as_the_data_has_them() -> None:
    trained: Any = SimpleNamespace(class_counts=[10, 0, 30])
    drawn = draw_labels(trained, 4000, 0)
    counts = Counter(drawn)
    assert counts[1] == 0
    # Binomial: a standard deviation is √(4000 · ¼ · ¾) = 27.
    assert abs(counts[0] - 1000) < 5 * 27
    assert draw_labels(trained, 17, 0) == drawn[:17]
    assert draw_labels(trained, 4000, 1) != drawn


def test_a_class_s_name_leads_nowhere_else(cascade_run: Path, tmp_path: Path) -> None:
    exported = tmp_path / "exported"
    export(["--checkpoint", str(cascade_run), "--out", str(exported), "--passes", "1"])
    described = json.loads((exported / "config.json").read_text())
    described["classes"] = ["..", "../.."]
    (exported / "config.json").write_text(json.dumps(described))
    out = tmp_path / "out"
    finished = dataset(exported, out, 4)
    assert finished.code == 0, finished.err
    assert sorted(path.name for path in (out / "clips").iterdir()) == ["-", "class 0"]
    assert len(hashes(out)) == 4
    assert sorted(path.name for path in out.iterdir()) == ["clips", "dataset.json", "labels.csv"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num", "3"], "--as-dataset and --num exclude each other"),
        (["--format", "npz"], "--format must be mp4 or png"),
        (["--format", "mp4,png"], "--format must be mp4 or png"),
    ],
    ids=str,
)
def test_what_excludes_it(
    cascade_run: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    finished = dataset(cascade_run, tmp_path, 2, *options)
    assert finished.code == 2
    assert message in finished.error
    assert "--as-dataset must be at least 1" in dataset(cascade_run, tmp_path, 0).error


def test_interpolated_clips_lead_from_one_to_the_other(cascade_run: Path, tmp_path: Path) -> None:
    def sampled(name: str, *options: str) -> list[str]:
        finished = sample("--checkpoint", cascade_run, "--out", tmp_path / name, *options)
        assert finished.code == 0, finished.err
        listed = json.loads((tmp_path / name / "samples.json").read_text())
        return [clip["sha256"] for clip in listed["clips"]]

    two = sampled("two", "--classes", "1", "--num", "2")
    way = sampled("way", "--classes", "1", "--interpolate", "4")
    assert [way[0], way[-1]] == two
    assert len(set(way)) == 4
    # A second walk of the class leads on from the first one's end.
    twice = sampled("twice", "--classes", "1", "--num", "2", "--interpolate", "4")
    three = sampled("three", "--classes", "1", "--num", "3")
    assert twice[:4] == way
    assert [twice[4], twice[-1]] == three[1:]
    # A clip by itself is the first of its class, whatever is interpolated beside it.
    assert sampled("both", "--classes", "0,1", "--interpolate", "4")[4:] == way


def test_a_latent_on_the_way_is_as_long_as_a_drawn_one() -> None:
    random = torch.Generator().manual_seed(0)
    begin, end = torch.randn(2, 5, 128, generator=random).double()
    torch.testing.assert_close(interpolate(begin, end, 0.0), begin)
    torch.testing.assert_close(interpolate(begin, end, 1.0), end)
    middle = interpolate(begin, end, 0.5)
    torch.testing.assert_close(middle.norm(dim=1), (begin.norm(dim=1) + end.norm(dim=1)) / 2)
    straight = (begin + end) / 2
    assert (straight.norm(dim=1) < 0.85 * middle.norm(dim=1)).all()
    torch.testing.assert_close(interpolate(begin, begin, 0.3), begin)
