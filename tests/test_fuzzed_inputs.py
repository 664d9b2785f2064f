"""Whatever is wrong with a file that is read: one line says so, or it is read without error.

By default a hundred mutants of each kind; `--mutants 10000` judges as many, `--mutants 700:800`
those from the 700th up to the 800th.
"""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fuzzing import Judge, seeds_of, verdicts
from judged_inputs import judge_configuration, judge_exported, judge_index, judge_tensors

import engine.export
from engine.video.indexing import build_index
from engine.video.writing import write_mp4

MOST_SECONDS = 30
"""For one of them. The slowest takes two, and far more where other processes want every core."""


@pytest.fixture
def check_all(pytestconfig: pytest.Config) -> Callable[[Judge], None]:
    """Judges as many as were asked for."""

    def check(judge: Judge) -> None:
        seeds = seeds_of(pytestconfig, 100)
        found = list(verdicts(seeds, judge, most_seconds=MOST_SECONDS))
        accepted = sum(not verdict.reason and not verdict.defect for verdict in found)
        slowest = max(found, key=lambda verdict: verdict.seconds)
        print(f"{len(found)} mutants, {accepted} accepted; {slowest.seed}: {slowest.seconds:.2f} s")
        defects = [f"{each.seed}: {each.defect}" for each in found if each.defect]
        assert not defects, f"{len(defects)} of {len(found)}\n" + "\n".join(defects[:20])
        # Otherwise too much or too little is broken for anything to be tested.
        assert 0.03 * len(found) - 3 < accepted < 0.5 * len(found) + 3

    return check


pytestmark = pytest.mark.timeout(0)  # however many there are: every mutant has a limit of its own


def test_configurations(check_all: Callable[[Judge], None]) -> None:
    check_all(judge_configuration)


def test_indexes(check_all: Callable[[Judge], None], tmp_path: Path) -> None:
    made = tmp_path / "made"
    for number in range(2):
        path = made / f"class {number}" / "clip.mp4"
        path.parent.mkdir(parents=True)
        write_mp4(path, torch.full((6, 3, 16, 16), 100 * number, dtype=torch.uint8), 8)
    build_index(made, made / "index.jsonl", num_workers=0, progress=False)
    check_all(functools.partial(judge_index, made))


def test_tensor_files(
    check_all: Callable[[Judge], None], cascade_run: Path, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    made.mkdir()
    for stage in (1, 2):
        for file in (cascade_run / f"stage{stage}" / "checkpoints/step-00000002").glob("*.pt"):
            shutil.copy(file, made / f"{stage}-{file.name}")
    assert len(list(made.iterdir())) == 8  # two shards, the generator and random states, twice
    check_all(functools.partial(judge_tensors, made))


def test_exported_folders(
    check_all: Callable[[Judge], None], cascade_run: Path, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    engine.export.main(["--checkpoint", str(cascade_run), "--out", str(made), "--passes", "2"])
    check_all(functools.partial(judge_exported, made))
