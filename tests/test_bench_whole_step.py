"""Whole iterations: what is counted, how the largest micro-batch is found, and the tables."""

from contextlib import closing
from pathlib import Path

import pytest
from result_files import CPU, document, row

from benchmarks import merge, report, results, step_report, whole_step
from benchmarks.results import Attempt, Document
from benchmarks.setups import (
    BUILDS,
    SETUPS,
    USABLE_BYTES,
    config_of,
    few_channels,
    most_that_fits,
    step_of,
)
from benchmarks.timing import Spread
from benchmarks.whole_step import (
    Counted,
    count_iteration,
    largest_that_fits,
    reduced,
    search,
)
from engine.trainer.ranks import Ranks

GIB = 1 << 30


def attempt(samples: int, gib_per_sample: float, seconds: float) -> Attempt:
    spread = Spread(seconds, seconds, seconds)
    peak = int((2 + gib_per_sample * samples) * GIB)
    return Attempt(samples=samples, seconds=spread, peak_bytes=peak)


# -------------------------------------------------------------------------------- search


def test_the_search_doubles_until_the_card_is_full() -> None:
    """2 GiB and 3 per sample: 18 samples fill 56 GiB; a call costs 1 s and a sample a tenth."""

    def tried(samples: int) -> Attempt | None:
        return attempt(samples, 3, 1 + samples / 10) if samples <= 18 else None

    attempts, limit = search(tried, first=4, card_bytes=56 * GIB, usable_bytes=100 * GIB)
    assert [a.samples for a in attempts] == [4, 8, 16]
    assert step_of("stage1", "ours", attempts, 1, 1, limit).best == attempt(16, 3, 2.6)
    assert most_that_fits(attempts, 26 * GIB, limit) == 8
    assert most_that_fits(attempts, 25 * GIB, limit) == 4
    assert most_that_fits(attempts, 13 * GIB, limit) == 0
    assert most_that_fits(attempts, 56 * GIB, limit) == 16
    assert most_that_fits(attempts, 57 * GIB, limit) is None, "a larger card might hold more"


def test_a_larger_card_stands_in_for_a_smaller() -> None:
    attempts, limit = search(
        lambda samples: attempt(samples, 3, 1), first=1, card_bytes=200 * GIB, usable_bytes=60 * GIB
    )
    assert [a.samples for a in attempts] == [1, 2, 4, 8, 16]
    assert most_that_fits(attempts, 60 * GIB, limit) == 16
    assert search(lambda _: None, first=1, card_bytes=GIB, usable_bytes=GIB)[0] == []
    small, limit = search(
        lambda n: attempt(n, 0.01, 1), first=4, card_bytes=GIB, usable_bytes=GIB, most_samples=8
    )
    assert most_that_fits(small, 3 * GIB, limit) is None, "not tried any further"


def test_what_else_stops_a_size_keeps_the_sizes_before() -> None:
    def tried(samples: int) -> Attempt | None:
        if samples > 8:
            raise RuntimeError("fewer than INT_MAX elements, please")
        return attempt(samples, 1, 1)

    with pytest.warns(UserWarning, match="16 samples: fewer than INT_MAX"):
        attempts, limit = search(tried, first=4, card_bytes=56 * GIB, usable_bytes=100 * GIB)
    assert [a.samples for a in attempts] == [4, 8]
    assert most_that_fits(attempts, 56 * GIB, limit) is None, "memory was not what stopped it"
    with pytest.raises(RuntimeError, match="INT_MAX"):
        search(tried, first=16, card_bytes=56 * GIB, usable_bytes=100 * GIB)


def test_samples_on_a_line() -> None:
    """1000 bytes and 100 per sample."""
    first, second = (Counted(n, 1.0, 1000 + 100 * n) for n in (4, 32))
    assert largest_that_fits(first, second, 1000 + 6400) == 64
    assert largest_that_fits(first, second, 1000 + 6399) == 32
    assert largest_that_fits(first, second, 1100) == 1
    assert largest_that_fits(first, second, 1099) == 0


# ------------------------------------------------------------------------------- counting


def test_setups_are_the_papers_sizes() -> None:
    sizes = {}
    for name, setup in SETUPS.items():
        stage = config_of(setup, BUILDS["fp32"], setup.samples).stages[setup.number]
        sizes[name] = stage.resolution, stage.num_frames
        assert f"{stage.resolution}x{stage.resolution}/{stage.num_frames}" in setup.title
    assert sizes["stage1"] == (32, 25)
    assert (sizes["stage2_6"], sizes["stage2_12"]) == ((128, 6), (128, 12))
    assert sizes["dvdgan_50"] == (128, 50)
    assert config_of(SETUPS["stage1"], BUILDS["fp32"], 4).stages[1].training.precision == "fp32"
    assert config_of(SETUPS["dvdgan_50"], BUILDS["ours"], 2).stages[1].training.micro_batch == 2


def test_the_graphs_build_records_passes_of_what_it_trains(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the engine's own `accelerate` is asked to, which a CPU does not do."""
    asked: list[tuple[str, object]] = []
    monkeypatch.setattr(
        whole_step,
        "accelerate",
        lambda stage, _, trainer, previous: asked.append((stage.training.acceleration, trainer)),
    )
    for name, mode in (("ours", "none"), ("graphs", "cuda_graphs")):
        with closing(reduced(SETUPS["stage2_6"], BUILDS[name], ranks)) as iterations:
            assert asked.pop() == (mode, iterations.trainer)
    assert [name for name, build in BUILDS.items() if build.usual_samples_only] == ["graphs"]


@pytest.mark.long
def test_plain_counts_are_the_design_notes() -> None:
    """TFLOP per sample of a straightforward build with time pooled in D: 17.2, 11.3 and 52.5.

    With them the paper's two claims: half the training time, a quarter of the memory per sample.
    The notes round to a tenth of a TFLOP.
    """
    fp32 = BUILDS["fp32"]
    one, two, baseline = (
        count_iteration(
            setup, fp32, setup.samples, (f"stages.{setup.number}.discriminators.pool_time=true",)
        )
        for setup in (SETUPS[name] for name in ("stage1", "stage2_12", "dvdgan_50"))
    )
    flops = [counted.tflop_per_sample for counted in (one, two, baseline)]
    assert flops == pytest.approx([17.2, 11.3, 52.5], abs=0.06)
    assert (flops[0] + flops[1]) / flops[2] == pytest.approx(0.54, abs=0.005)
    larger = max(one.peak_bytes / one.samples, two.peak_bytes / two.samples)
    assert 0.2 < larger / (baseline.peak_bytes / baseline.samples) < 0.3


@pytest.mark.slow
def test_memory_between_two_counts_lies_on_their_line() -> None:
    """So few channels that the batch is everything."""
    setup = SETUPS["stage2_6"]
    first, between, last = (
        count_iteration(setup, BUILDS["ours"], samples, few_channels(2)).peak_bytes
        for samples in (4, 16, 32)
    )
    assert between == pytest.approx(first + (last - first) * 12 / 28, rel=1e-3)


# --------------------------------------------------------------------------------- tables


def step(setup: str, build: str, how: str = "measured", **changes: object) -> dict[str, object]:
    samples = SETUPS[setup].samples
    seconds = [0.5, 0.4, 0.6]
    measured = {"samples": samples, "seconds": seconds, "peak_bytes": 10_000_000_000 * samples}
    return {
        "setup": setup,
        "build": build,
        "how": how,
        "tflop_per_sample": 12.0,
        "usual": measured if how == "measured" else measured | {"seconds": None},
        "best": {"samples": 32, "seconds": [2.0, 1.9, 2.1], "peak_bytes": 3}
        if how == "measured"
        else None,
        "fits": {"32 GB": 4, "80 GB": None},
        "matmul_tflop_per_s": 500.0 if how == "measured" else None,
    } | changes


def test_measured_steps_beside_table_3() -> None:
    steps = [
        step("stage1", "ours", fits={"32 GB": 4, "80 GB": 32}),
        step("stage2_generated", "ours", tflop_per_sample=10.0, fits={"32 GB": 4, "80 GB": 64}),
        step("stage2_generated", "bf16", tflop_per_sample=15.0),
        step("dvdgan_50", "ours", usual={"samples": 1, "seconds": [0.5, 0.5, 0.5],
                                         "peak_bytes": 20_000_000_000},
             fits={"32 GB": 1, "80 GB": 8}),
    ]  # fmt: skip
    made = Document.model_validate(document(steps=steps, rows=[]))
    lines = "\n".join(step_report.parts({"cuda": made})).splitlines()
    # 300 000 · 3.45 s = 11.98 days.
    assert (
        "| stage 1 32x32/25 | the paper's | 4 |  | 27897 at 4 | 3.45 |  |  |  |  |  | 12.0 |  |"
        in lines
    )
    # 2 s of 32: 62.5 ms per sample, 10 / 0.0625 = 160 TFLOP/s of 500, 15 of the plain build's.
    # 300 000 iterations of 0.5 s and of 64 samples: 1.7 and 13.9 days.
    title = "stage 2 128x128/12 and stage 1 for its x_l"
    assert (
        f"| {title} | this engine | 4 | 64 | 40000 at 4 | 0.5 | 2 of 32 | 62.5 | 160 | 0.32 | "
        "0.48 | 1.7 | 13.9 |" in lines
    )
    # DVD-GAN's four samples are four passes.
    [baseline] = [x for x in lines if x.startswith("| DVD-GAN 128x128/50 | this engine")]
    assert baseline.split(" | ")[5] == "2"
    assert any("DVD-GAN 128x128/12 | plain and this engine | not run |" in x for x in lines)
    # The paper: (3.45 + 3.2) / (4 · 2.975), and 29073 / 4 / 32203.
    assert "| Table 3 | the paper's | 0.56 |  | 0.23 |  |" in lines
    # Ours: (0.5 / 4 + 0.5 / 4) / 0.5, 10 of 20 GB, and 8 samples against 32.
    assert (
        "| measured, the paper's samples per GPU | this engine | 0.50 |  | 0.50 | 0.25 |" in lines
    )
    tables = [x.count("|") for x in lines if x.startswith("|")]
    assert set(tables) == {14, 7}, "every line as long as its header"


def test_counted_and_reduced_steps() -> None:
    steps = [
        step("stage1", "fp32", "counted", tflop_per_sample=18.76),
        step("stage2_12", "fp32", "counted", tflop_per_sample=12.37),
        step("dvdgan_50", "fp32", "counted", tflop_per_sample=56.0),
    ]
    shapes = [f"{SETUPS[name].title}, 4 channels" for name in ("stage1", "stage2_12", "dvdgan_50")]
    rows = [
        row(side, operator="whole_step", shape=shape, direction="step", gb_per_s=None,
            seconds=[seconds] * 3)
        for shape, seconds in zip(shapes, (1.0, 2.0, 6.0), strict=True)
        for side in ("ours", "contiguous")
    ]  # fmt: skip
    made = Document.model_validate(document(device=CPU, steps=steps, rows=rows))
    text = report.render({"cpu": made})
    lines = text.splitlines()
    assert "| stage 1 32x32/25 | plain fp32 | 4 |  | 40000 at 4 | 18.76 |" in lines
    assert f"| {shapes[2]} | 6 (6 to 6) | 3.00 (2.50 to 3.50) |" in lines
    # (18.76 + 12.37) / 56; (1 + 2) / 6.
    assert "| counted, FLOPs as time | plain fp32 |  | 0.56 |  |  |" in lines
    assert "| measured on a CPU, reduced | this engine |  | 0.50 |  |  |" in lines
    assert sum("whole_step" in x for x in lines) == 0, "not among the operators too"
    assert text.index("**GPU:** not run") < text.index("Table 3")


def test_steps_of_a_second_call_replace_the_first_ones() -> None:
    case = {"case": "whole_step[stage1-ours]", "reason": "budget"}
    before = Document.model_validate(
        document(steps=[step("stage1", "ours", tflop_per_sample=1.0), step("stage2_6", "ours")],
                 skipped=[case])
    )  # fmt: skip
    more = Document.model_validate(document(steps=[step("stage1", "ours")], skipped=[]))
    assert [s.case for s in more.steps] == [case["case"]]
    both = results.added(before, more)
    assert [(s.setup, s.tflop_per_sample) for s in both.steps] == [("stage2_6", 12), ("stage1", 12)]
    assert both.skipped == []


def test_files_of_several_calls_become_one(tmp_path: Path) -> None:
    skipped = [{"case": "whole_step[stage1-ours]", "reason": "budget"}]
    first = Document.model_validate(document(steps=[step("stage2_6", "ours")], skipped=skipped))
    second = Document.model_validate(
        document(steps=[step("stage1", "ours")], skipped=[], rows=[row(shape="other")])
    )
    paths = [tmp_path / "first.json", tmp_path / "second.json"]
    for path, made in zip(paths, (first, second), strict=True):
        results.save(made, path)
    merge.main([*map(str, paths), "--results", str(tmp_path / "all")])
    [path] = (tmp_path / "all").iterdir()
    merged = results.read(path)
    assert [s.setup for s in merged.steps] == ["stage2_6", "stage1"]
    assert len(merged.rows) == len(first.rows) + 1
    assert merged.skipped == []


def test_caps_leave_room() -> None:
    assert USABLE_BYTES["32 GB"] < 32 * GIB
    assert USABLE_BYTES["80 GB"] < 80 * GIB
