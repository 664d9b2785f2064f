"""Whatever is wrong with a file: it is rejected, or read without error and the same every time.

By default 600 mutants; `--mutants 10000` judges as many, `--mutants 700:800` those from the 700th
up to the 800th.
"""

import os
import signal
import time
from pathlib import Path

import pytest
from fuzzing import Verdict, seeds_of, verdicts
from judged_videos import judge_video
from mutants import BASES, bases, mutant

from engine.video.inspection import inspect_video


@pytest.mark.timeout(0)  # however many there are: every mutant has a limit of its own
def test_mutants_are_rejected_or_read_consistently(pytestconfig: pytest.Config) -> None:
    found = list(verdicts(seeds_of(pytestconfig, 600), judge_video, prepare=bases))
    accepted = sum(not verdict.reason and not verdict.defect for verdict in found)
    slowest = max(found, key=lambda verdict: verdict.seconds)
    print(
        f"{len(found)} mutants, {accepted} of them accepted; the slowest is {slowest.seed}: "
        f"{slowest.seconds:.2f} s; memory up to {max(verdict.mib for verdict in found)} MiB"
    )
    defects = [verdict for verdict in found if verdict.defect]
    assert not defects, "\n".join(map(told, defects))
    # Otherwise too much or too little is broken for anything to be tested.
    assert 0.2 * len(found) - 5 < accepted < 0.8 * len(found) + 5


def told(verdict: Verdict) -> str:
    """What is wrong, and how the mutant is made and judged again."""
    _, _, story = mutant(verdict.seed)
    return (
        f"mutant {verdict.seed}: {verdict.defect}\n"
        f"  {story}\n"
        f"  written by   .venv/bin/python tests/video/mutants.py {verdict.seed} FOLDER\n"
        f"  judged by    .venv/bin/python -m pytest tests/video/test_fuzzed_files.py "
        f"--mutants {verdict.seed}:{verdict.seed + 1}"
    )


def test_what_is_changed_was_sound(tmp_path: Path) -> None:
    for name in BASES:
        path = tmp_path / name
        path.write_bytes(bases()[name])
        assert inspect_video(path).num_frames == 30


def test_a_seed_says_all() -> None:
    again = mutant(7)
    bases.cache_clear()
    assert mutant(7) == again
    assert mutant(7) != mutant(7 + len(BASES))


def harmful(seed: int, folder: Path) -> str:
    """Judges like a decoder with defects."""
    if seed == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    if seed == 3:
        time.sleep(60)
    if seed == 4:
        raise ZeroDivisionError("by zero")
    if seed == 5:
        bytearray(300 << 20)
    return "damaged"


def test_crashes_hangs_errors_and_greed_are_found() -> None:
    """Without an end to the process that sees them."""
    found = list(verdicts(range(7), harmful, most_seconds=2, most_mib=200))
    assert [verdict.seed for verdict in found] == list(range(7))
    assert found[5].defect == f"takes {found[5].mib} MiB"
    assert 290 <= found[5].mib <= 310  # the kernel counts in batches
    assert {verdict.seed: verdict.defect for verdict in found if verdict.defect} == {
        1: "ends the process: SIGSEGV",
        3: "takes too long",
        4: "ZeroDivisionError: by zero",
        5: found[5].defect,
    }
    assert "--mutants 1:2" in told(found[1])
