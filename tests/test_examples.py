"""The examples of docs/examples/ run as scripts and show what they say."""

from pathlib import Path

import numpy as np
import pytest
from small_runs import REPOSITORY, Finished, python, sample

EXAMPLES = REPOSITORY / "docs" / "examples"
MOST_LINES = 40


def _run(name: str, *arguments: str | Path) -> list[str]:
    finished: Finished = python(f"docs/examples/{name}", *arguments)
    assert finished.code == 0, finished.err
    return finished.out.splitlines()


def test_there_are_no_others_and_all_are_short() -> None:
    lines = {path.name: path.read_text().count("\n") for path in EXAMPLES.glob("*.py")}
    assert set(lines) == {"custom_block.py", "one_operator.py", "sample_a_checkpoint.py"}
    assert max(lines.values()) <= MOST_LINES, lines


def test_an_operator_by_itself_is_its_reference() -> None:
    chosen, *compared, times = _run("one_operator.py")
    assert "folded" in chosen
    assert [line.split(":")[0] for line in compared] == ["y", "dx", "dweight"]
    # √K roundings of fp32 for the longest sum, dweight's over K = 2·6·32² pixels.
    bound = (2 * 6 * 32**2) ** 0.5 * np.finfo(np.float32).eps
    assert all(float(line.split()[-1]) < bound for line in compared), compared
    assert "reference" in times


def test_a_custom_block_computed_again_has_the_same_gradients() -> None:
    kept, recomputed = _run("custom_block.py")
    assert kept == recomputed
    assert kept.startswith("[2, 6, 16, 8, 8], gradients add up to ")


@pytest.mark.slow
def test_sampling_gives_the_bytes_of_the_script(cascade_run: Path, tmp_path: Path) -> None:
    (line,) = _run("sample_a_checkpoint.py", cascade_run, tmp_path / "clips.npy")
    assert line == f"{tmp_path}/clips.npy: 4 clips of 6 frames"
    options = ("--checkpoint", cascade_run, "--out", tmp_path, "--num", "4", "--format", "npz")
    written = sample(*options)
    assert written.code == 0, written.err
    clips = np.load(tmp_path / "clips.npy")
    assert clips.dtype == np.uint8
    assert clips.std() > 0
    np.testing.assert_array_equal(clips, np.load(tmp_path / "samples.npz")["videos"])
