"""--profile with many micro-batches: few are looked at, and all of them are accounted for."""

import gzip
import json
from bisect import bisect
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import Tiny, contents, differences, logged
from small_trainers import make
from torch.utils.flop_counter import FlopCounterMode

from engine.trainer.profiling import timeline
from engine.trainer.profiling.counts import CountedWork, OperatorCounter
from engine.trainer.profiling.module_table import Entry, StepCosts
from engine.trainer.profiling.places import (
    D_UPDATE,
    FORWARD,
    G_UPDATE,
    OTHER,
    REST,
    STEP,
    Place,
    Range,
    named_parts,
)
from engine.trainer.profiling.recorders import CountRecorder
from engine.trainer.profiling.step_profile import StepProfile
from engine.trainer.profiling.timeline import Peak
from engine.trainer.profiling.windows import Windows
from engine.trainer.ranks import Ranks
from engine.trainer.step import StepStoppedError

NUM_STEPS = 2
EPS = torch.finfo(torch.float64).eps


def accumulated(num: int) -> list[str]:
    """Settings with so many micro-batches in an update of 16 samples."""
    return ["training.global_batch=16", f"training.micro_batch={16 // num}"]


# ------------------------------------------------------------------------------- whole runs


def profiled_run(tiny: Tiny, out: Path, num: int, *options: str) -> Path:
    settings = [word for setting in accumulated(num) for word in ("--set", setting)]
    tiny.trained(1, out, *settings, "--max-steps", "7", *options)
    return out / "stage1"


@pytest.fixture(scope="module")
def four(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 1, two steps of which are timed; 4 micro-batches in each of three updates."""
    return profiled_run(tiny, tmp_path_factory.mktemp("four"), 4, "--profile")


@pytest.fixture(scope="module")
def sixteen(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `four`, of 16 micro-batches."""
    return profiled_run(tiny, tmp_path_factory.mktemp("sixteen"), 16, "--profile")


def document(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "profile/modules.json").read_text())
    return read


def events(folder: Path) -> list[dict[str, Any]]:
    with gzip.open(folder / "profile/trace.json.gz", "rt") as text:
        found: list[dict[str, Any]] = json.load(text)["traceEvents"]
    return found


UPDATES_OF_16 = {
    "D update, micro-batch 1 of 16": 2,
    "D update, micro-batches 2 to 15 of 16": 28,
    "D update, micro-batch 16 of 16": 2,
    "D update, outside micro-batches": 2,
    "G update, micro-batch 1 of 16": 1,
    "G update, micro-batches 2 to 15 of 16": 14,
    "G update, micro-batch 16 of 16": 1,
    "G update, outside micro-batches": 1,
    STEP: 1,
}


def test_training_is_the_same_with_a_profile(tiny: Tiny, sixteen: Path, tmp_path: Path) -> None:
    plain = profiled_run(tiny, tmp_path, 16)
    assert logged(sixteen) == logged(plain)
    (checkpoint,) = (plain / "checkpoints").glob("step-*7")
    profiled = contents(sixteen / "checkpoints" / checkpoint.name)
    assert differences(profiled, contents(checkpoint)) == []


def test_a_trace_does_not_grow_with_the_number_of_micro_batches(four: Path, sixteen: Path) -> None:
    few, many = len(events(four)), len(events(sixteen))
    # Less than a third of 12 and 48 micro-batches is beside them. Threads may differ by some.
    assert abs(few - many) < 0.03 * few


def test_the_trace_has_one_of_each_kind(sixteen: Path) -> None:
    """In every step, and "alike" are neighbours of the first, in D and in G."""
    labels = Counter(e["name"] for e in events(sixteen) if e["name"].startswith("update: "))
    # What is around micro-batches is entered again in every window that it reaches into.
    num_windows = {STEP: 3, **{f"{u}, outside micro-batches": 2 for u in (D_UPDATE, G_UPDATE)}}
    assert labels == {
        f"update: {name}": NUM_STEPS * num_windows.get(name, 1) for name in UPDATES_OF_16
    }


def test_windows_are_one_trace(sixteen: Path) -> None:
    """They follow each other, arrows have an end each, and threads are named once."""
    found = events(sixteen)
    steps = sorted((e["ts"], e["dur"]) for e in found if e["name"] == "update: step")
    assert len(steps) == 3 * NUM_STEPS
    ends = [start + duration for start, duration in steps]
    assert all(end < start for end, (start, _) in zip(ends, steps[1:], strict=False))
    flows = Counter((e["id"], e["ph"]) for e in found if e["ph"] in "sf")
    assert len(flows) > 1000
    assert set(flows.values()) == {1}
    assert {number for number, _ in flows} == {number for number, ph in flows if ph == "s"}
    facts = Counter(
        (e["name"], e["pid"], e["tid"], str(e["args"])) for e in found if e["ph"] == "M"
    )
    assert set(facts.values()) == {1}


def test_the_peak_is_the_highest_windows(sixteen: Path) -> None:
    """What is freed between windows is in no trace, so each begins with nothing."""
    found = events(sixteen)
    steps = sorted((e["ts"], e["dur"]) for e in found if e["name"] == "update: step")
    between = [(start + duration + after) / 2 for (start, duration), (after, _) in pairwise(steps)]
    windows: list[list[dict[str, Any]]] = [[] for _ in steps]
    for event in found:
        if "ts" in event:
            windows[bisect(between, event["ts"])].append(event)
    peaks = [timeline.peak({"traceEvents": window}, "cpu").num_bytes for window in windows]
    assert len(set(peaks)) > 2
    assert document(sixteen)["peak_bytes"] == max(peaks)


def test_every_update_is_its_part_of_the_trace_times_its_weight(sixteen: Path) -> None:
    """Seconds by `Place.update`, out of the trace's ranges and nothing else."""
    found, read = events(sixteen), document(sixteen)
    own: dict[str, float] = defaultdict(float)  # without the ranges inside
    for event in found:
        if event["name"].startswith("update: "):
            name = event["name"].removeprefix("update: ")
            own[name] += event["dur"]
            if "outside" in name:
                own[STEP] -= event["dur"]
            elif "micro-batch" in name:
                own[f"{name[:8]}, outside micro-batches"] -= event["dur"]
    seconds: dict[str, float] = defaultdict(float)
    for entry in read["entries"]:
        seconds[entry["update"]] += entry["seconds"]
    assert own.keys() == seconds.keys() == UPDATES_OF_16.keys()
    assert min(own.values()) > 0
    for name, weight in UPDATES_OF_16.items():
        # A trace's times are rounded to a nanosecond.
        expected = own[name] / 1e6 / NUM_STEPS * weight
        assert seconds[name] == pytest.approx(expected, abs=1e-9 * weight * len(found)), name
    assert read["step_seconds"] == pytest.approx(sum(seconds.values()), rel=len(found) * EPS)


def test_the_document_says_what_was_scaled(sixteen: Path) -> None:
    read = document(sixteen)
    assert read["weights"] == {name: n for name, n in UPDATES_OF_16.items() if n > 1}
    assert (read["num_micro_batches"], read["num_looked_at"], read["num_steps"]) == (48, 6, 2)
    text = (sixteen / "profile/modules.md").read_text()
    assert "Of 48 micro-batches 6 were looked at" in text
    assert "D update, micro-batches 2 to 15 of 16 by 28" in text


def test_the_scaled_step_is_about_as_long_as_a_plain_one(sixteen: Path) -> None:
    """Unscaled it would be 6 of 48 micro-batches. The rest is what a busy machine does."""
    read = document(sixteen)
    assert 0.2 < read["step_seconds"] / read["plain_step_seconds"] < 8


# ------------------------------------------------------------------------------- the counts


def by_part(entries: list[Entry]) -> dict[tuple[str, ...], tuple[int, int]]:
    """FLOPs and bytes by update, where its micro-batches are put together, and part."""
    sums: dict[tuple[str, ...], tuple[int, int]] = defaultdict(lambda: (0, 0))
    for entry in entries:
        update, *others = entry.place
        key = update.partition(",")[0], *others
        sums[key] = sums[key][0] + entry.flops, sums[key][1] + entry.num_bytes
    return dict(sums)


def costs(
    seconds: dict[Place, float], counted: dict[Place, CountedWork], weights: dict[str, int]
) -> StepCosts:
    return StepCosts.of(
        seconds,
        counted,
        weights=weights,
        num_steps=NUM_STEPS,
        num_micro_batches=48,
        num_looked_at=6,
        device_type="cpu",
        plain_step_seconds=1.0,
        matmul_flop_per_s=1e12,
        matmul_dtype="float32",
        peak=Peak(),
    )


@pytest.mark.parametrize(
    ("number", "num_accumulated", "d_updates", "zero_stage"),
    # Both ZeRO stages, which differ after the micro-batches, with both stages' networks.
    [(1, 4, 1, 0), (1, 4, 1, 1), (2, 4, 3, 1), (1, 8, 2, 1), (2, 2, 2, 0)],
)
def test_scaled_counts_are_those_of_every_micro_batch(
    tiny: Tiny, ranks: Ranks, number: int, num_accumulated: int, d_updates: int, zero_stage: int
) -> None:
    settings = [f"training.discriminator_steps={d_updates}", f"training.zero_stage={zero_stage}"]
    trainer = make(ranks, tiny.config(*accumulated(num_accumulated), *settings), number)
    trainer.train_step()
    windows = Windows(trainer)
    scaled = CountRecorder(torch.device("cpu"), Path("unused"), num_windows=windows.number)
    windows.show(scaled)
    got = costs({}, scaled.counter.counted, windows.weights)
    whole = OperatorCounter()
    with named_parts(trainer, whole.enter, whole.leave), whole:
        trainer.train_step()
    assert by_part(got.entries) == by_part(costs({}, whole.counted, {}).entries)
    # In a step of its own: it keeps gradients alive, so that some are copied.
    with FlopCounterMode(display=False) as everything:
        trainer.train_step()
    assert sum(entry.flops for entry in got.entries) == everything.get_total_flops()


def test_a_table_by_hand() -> None:
    """Two steps looked at: 3 s and 1 s in all, weights 10 and 1, so 15.5 s a step."""
    alike, other = (Place(update, REST, FORWARD, OTHER) for update in ("D alike", "G"))
    table = costs(
        {alike: 3.0, other: 1.0},
        {alike: CountedWork(int(1e12), 10**9), other: CountedWork(int(2e12), 2 * 10**9)},
        {"D alike": 10},
    )
    assert table.step_seconds == pytest.approx(15.5)
    lines = table.markdown("a title").splitlines()
    assert "| D alike | 15000.00 | 0.00 | 96.8 % | 10 | 10 | 66.7 % |" in lines
    assert "| G | 500.00 | 0.00 | 3.2 % | 2 | 2 | 400.0 % |" in lines


# ------------------------------------------------------------------------------- the windows


class Noted:
    """What a recorder is told, updates only."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.num_calls = 0
        self._open: list[bool] = []

    def note(self, what: str) -> None:
        self.told.append(what)

    def prepare(self) -> None:
        self.note("prepare")

    def begin(self) -> None:
        self.note("begin")

    def enter(self, entered: Range) -> None:
        self.num_calls += 1
        self._open.append(entered.update is not None)
        if entered.update is not None:
            self.note(entered.update)

    def leave(self) -> None:
        self.num_calls += 1
        if self._open.pop():
            self.note("-")

    def end(self) -> None:
        assert self._open == []
        self.note("end")


def noted(ranks: Ranks, tiny: Tiny, num: int, d_updates: int) -> Noted:
    config = tiny.config(*accumulated(num), f"training.discriminator_steps={d_updates}")
    trainer, recorder = make(ranks, config), Noted()
    Windows(trainer).show(recorder)
    # Nothing is left of it.
    assert not {"train_step", "d_step", "_d_micro_batch", "_g_micro_batch"} & vars(trainer).keys()
    return recorder


@pytest.mark.parametrize("d_updates", [1, 2, 3])
def test_three_windows(ranks: Ranks, tiny: Tiny, d_updates: int) -> None:
    d, g = (
        [f"{u}, micro-batch 1 of 4", f"{u}, micro-batches 2 to 3 of 4", f"{u}, micro-batch 4 of 4"]
        for u in (D_UPDATE, G_UPDATE)
    )
    d_outside, g_outside = (f"{u}, outside micro-batches" for u in (D_UPDATE, G_UPDATE))
    assert noted(ranks, tiny, 4, d_updates).told == [
        *("begin", STEP, d_outside, d[0], "-", d[1], "-", "-", "-", "end"),
        "prepare",
        *("begin", STEP, d_outside, d[2], "-", "-"),
        *(g_outside, g[0], "-", g[1], "-", "-", "-", "end"),
        "prepare",
        *("begin", STEP, g_outside, g[2], "-", "-", "-", "end"),
    ]


@pytest.mark.parametrize("num", [1, 2])
def test_no_two_are_alike(ranks: Ranks, tiny: Tiny, num: int) -> None:
    """The whole step is one window, as if there were none."""
    recorder = noted(ranks, tiny, num, 2)
    updates = (D_UPDATE, "-", D_UPDATE, "-", G_UPDATE, "-")
    assert recorder.told == ["begin", STEP, *updates, "-", "end"]


def test_what_is_not_looked_at_is_not_told(ranks: Ranks, tiny: Tiny) -> None:
    assert noted(ranks, tiny, 4, 2).num_calls == noted(ranks, tiny, 16, 3).num_calls > 100


def test_a_step_that_fails_ends_its_window(ranks: Ranks, tiny: Tiny) -> None:
    trainer, recorder = make(ranks, tiny.config(*accumulated(4))), Noted()

    def fails(batch: Any) -> Any:
        raise ZeroDivisionError

    trainer._judged = fails  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        Windows(trainer).show(recorder)
    assert recorder.told[-1] == "end"
    assert recorder.told.count("begin") == 1


@pytest.mark.parametrize("num", [2, 4])
@pytest.mark.parametrize("step", [3, 4, 6])  # counted, traced for nothing, the last
def test_profiled_steps_ask_whether_to_go_on(
    ranks: Ranks, tiny: Tiny, tmp_path: Path, num: int, step: int
) -> None:
    """As often as others do, since the question is collective; after a no nothing is left."""
    watched = StepProfile(
        make(ranks, tiny.config(*accumulated(num))),
        tmp_path,
        num_steps=NUM_STEPS,
        title="",
        dtype=torch.float32,
    )
    num_asked = 0

    def goes_on() -> bool:
        nonlocal num_asked
        num_asked += 1
        return num_asked < 3 * num * step  # not before the last micro-batch of this step

    for _ in range(step - 1):
        watched.train_step(goes_on)
    with pytest.raises(StepStoppedError):
        watched.train_step(goes_on)
    assert num_asked == 3 * num * step
    watched.close()
    assert list(tmp_path.rglob("*.*")) == []
