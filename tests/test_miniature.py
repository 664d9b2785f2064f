"""The paper in miniature: its models, equal cost, the rules of verdicts, and a quick run of it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from miniature_figures import REAL, measured, tiny_plan
from plain_network import PlainNetwork
from small_runs import call
from torch import Tensor

import engine.train
from benchmarks.miniature import __main__ as miniature
from benchmarks.miniature import evaluating, measuring
from benchmarks.miniature import plan as plans
from benchmarks.miniature.budget import (
    MINUTES,
    OVERHEAD_MINUTES,
    STAGE_1,
    SUSTAINED_GFLOPS,
    Budget,
    budget_for,
    count,
    iteration_flops,
    iterations_of,
)
from benchmarks.miniature.jobs import Job, jobs_of
from benchmarks.miniature.measured import ClipFigures
from benchmarks.miniature.measuring import fading
from benchmarks.miniature.models import (
    FULL,
    MODELS,
    PAPERS_LOW_FRAMES,
    configuration,
    folder_of,
    own_options,
)
from benchmarks.miniature.plan import MiniaturePlan, Settings, settle
from benchmarks.miniature.verdicts import (
    AFTER_12,
    BY_MOTION,
    CONCLUSIONS,
    GROUNDING,
    SPECTRAL,
    Figure,
    Outcome,
    compare,
    judge,
    verdict,
)
from engine.errors import UserError
from engine.evaluation.classifier import Classifier, View
from engine.planning.forward_pass import count_forward, count_frozen
from engine.trainer.checkpoints import find_checkpoint

BY_NAME = {model.name: model for model in MODELS}

# Models.


def test_each_model_differs_from_the_full_one_by_what_the_paper_changes() -> None:
    full = configuration(FULL)
    assert (full.stages[2].num_frames, full.upsampling(2).num_frames) == (12, 6)
    assert configuration(BY_NAME["window3"]).upsampling(2).num_frames == 3
    assert not configuration(BY_NAME["no_matching"]).stages[2].discriminators.matching
    assert configuration(BY_NAME["conv_gru"]).stages[2].generator.temporal == "conv_gru"
    joint = configuration(BY_NAME["joint"]).stages[2]
    assert joint.joint
    assert not joint.discriminators.matching
    for name in ("no_matching", "window3", "conv_gru", "joint"):
        config = configuration(BY_NAME[name])
        assert config.stages[1] == full.stages[1], name  # it can be shared
        assert config.stages[2].generator.channels == full.stages[2].generator.channels
        low_frames = config.stages[2].generator.low_frames
        assert (low_frames == "repeat") or not PAPERS_LOW_FRAMES


def test_dvdgan_is_stage_2_from_noise() -> None:
    full, config = configuration(FULL), configuration(BY_NAME["dvdgan"])
    (stage,) = config.stages.values()
    second = full.stages[2]
    assert (stage.resolution, stage.frame_stride, stage.num_frames) == (32, 2, 6)
    assert stage.generator.temporal == "conv_gru"
    assert stage.generator.multipliers == second.generator.multipliers
    assert stage.training == full.stages[1].training
    ours = full.stages[1].discriminators.minibatch_stddev
    assert stage.discriminators.minibatch_stddev == ours


def test_own_options_are_named_by_stage() -> None:
    training = {
        **{"ema_decay": None, "max_gradient_norm": None, "discriminator_steps": 2},
        **{"reuse_fakes": False, "generator_lr": 1e-4, "discriminator_lr": 5e-4},
    }

    def named(training: dict[str, Any], **generator: Any) -> list[str]:
        """Of the full model with 128 values of z, no minibatch stddev and x_l as it is, else."""
        config = configuration(FULL, training=training)
        stages = {}
        for number, stage in config.stages.items():
            plain = {"latent_size": 128, "edge_frames": 0} | (generator if number == 2 else {})
            parts = {
                "discriminators": stage.discriminators.model_copy(
                    update={"minibatch_stddev": False}
                ),
                "generator": stage.generator.model_copy(update=plain),
            }
            stages[number] = stage.model_copy(update=parts)
        return own_options(config.model_copy(update={"stages": stages}))

    assert named(training) == []
    assert named(training | {"ema_decay": 0.9}) == [
        "stage 1: weights averaged",
        "stage 2: weights averaged",
    ]
    assert named(training, latent_size=8, low_frames="interpolate", edge_frames=3) == [
        "stage 2: z of 8, x_l interpolated in time, x_l continued by 3 at each end"
    ]


# Equal cost.


def test_the_minutes_are_shared_out_without_rest() -> None:
    """One shared stage 1, a stage 2 for each model that shares it, both for each that does not."""
    budget = budget_for(MINUTES)
    total = budget.of(STAGE_1) + sum(budget.of(model.name) for model in MODELS)
    assert total == pytest.approx((MINUTES - OVERHEAD_MINUTES) * 60 * SUSTAINED_GFLOPS * 1e9)
    assert budget.of("full") == budget.of("conv_gru") == budget.stage_2
    assert budget.of("joint") == budget.of("dvdgan") == budget.stage_1 + budget.stage_2


def test_iterations_are_as_many_as_the_budget_allows() -> None:
    budget = Budget(stage_1=100, stage_2=1000)
    flops = {STAGE_1: 7.0, "full": 10.0, "window3": 3.0, "joint": 1100.0, "dvdgan": 2000.0}
    assert iterations_of(flops, budget) == {
        STAGE_1: 14, "full": 100, "window3": 333, "joint": 1, "dvdgan": 1,
    }  # fmt: skip


def test_flops_of_an_iteration_are_those_of_its_forward_passes() -> None:
    """Against engine/planning's count of single forward passes, put together by hand.

    Two D updates and one G update, each with fakes of its own and a frozen stage 1's windows. The
    counts differ by what the executed step folds and recomputes, and by spectral norm.
    """
    training = {"discriminator_steps": 2, "reuse_fakes": False, "checkpointing": "none"}
    config = configuration(FULL, training=training)
    forward, batch = count_forward(config, 2), config.stages[2].training.global_batch
    expected = batch * 1e12 * (forward.step + count_frozen(config, 2))
    assert iteration_flops(config, 2) == pytest.approx(expected, rel=0.3)
    once = configuration(FULL, training=training | {"discriminator_steps": 1})
    discriminators = forward.spatial + forward.temporal + forward.matching
    d_update = batch * 1e9 * (forward.generator + 2 * 3 * discriminators)
    saved = iteration_flops(config, 2) - iteration_flops(once, 2)
    frozen = batch * 1e12 * count_frozen(config, 2) / 3
    assert saved == pytest.approx(d_update + frozen, rel=0.3)


@pytest.fixture(scope="module")
def flops() -> dict[str, float]:
    """Of an iteration of every model, which take long to count."""
    return count()


def test_models_cost_as_their_changes_say(flops: dict[str, float]) -> None:
    assert flops.keys() == {STAGE_1, *BY_NAME}
    assert flops["no_matching"] < flops["full"] < flops["conv_gru"]
    # The windows are half as long; what stage 1 makes of them is less by less than half.
    assert flops["full"] / 2 < flops["window3"] < 0.7 * flops["full"]


# The verdicts' rules.


def outcome(figure: Figure, better: ClipFigures, worse: ClipFigures) -> Outcome:
    found = compare(figure, better, worse, REAL).outcome
    mirrored = {"for": "against", "against": "for"}
    assert compare(figure, worse, better, REAL).outcome == mirrored.get(found, found)
    return found


def test_grounding_is_clearly_better_by_a_tenth() -> None:
    worse = measured(grounding=10.0)
    assert outcome(GROUNDING, measured(grounding=8.9), worse) == "for"
    assert outcome(GROUNDING, measured(grounding=9.1), worse) == "alike"
    assert outcome(GROUNDING, measured(grounding=11.2), worse) == "against"
    assert outcome(GROUNDING, measured(grounding=0.1), measured(grounding=0.4)) == "alike"
    assert outcome(GROUNDING, measured(grounding=None), worse) == "no answer"


def test_spectra_as_near_as_real_ones_are_alike() -> None:
    def at(distance: float) -> ClipFigures:
        return measured(spectral_distances=[distance] * 4)

    assert outcome(SPECTRAL, at(0.2), at(0.3)) == "for"
    assert outcome(SPECTRAL, at(0.01), at(0.1)) == "alike"
    mixed = measured(spectral_distances=[0.1, 0.1, 0.1, 0.9])  # 0.3 on the mean
    assert outcome(SPECTRAL, at(0.31), mixed) == "alike"
    assert outcome(SPECTRAL, at(0.26), mixed) == "for"


def test_shares_differ_by_a_standard_error() -> None:
    """Of 100 clips, 0.5 and 0.6 have deviations of 0.05 and 0.049: 0.07 for the difference."""

    def known(share: float) -> ClipFigures:
        return measured(recognised={"motion": share})

    assert outcome(BY_MOTION, known(0.6), known(0.5)) == "for"
    assert outcome(BY_MOTION, known(0.56), known(0.5)) == "alike"
    assert outcome(BY_MOTION, known(0.4), known(0.5)) == "against"
    assert outcome(BY_MOTION, known(1.0), known(1.0)) == "alike"


def test_fading_is_measured_from_what_real_clips_do() -> None:
    def fades(to: float, moves: float = 1.0) -> ClipFigures:
        return measured(fading=[0.5, to], moves_within=[0.0, moves])

    assert outcome(AFTER_12, fades(0.8), fades(0.4)) == "for"
    assert outcome(AFTER_12, fades(0.45), fades(0.9**2 / 0.45)) == "alike"  # as far beyond it
    assert outcome(AFTER_12, fades(0.9), fades(0.85)) == "alike"  # both within a tenth
    assert outcome(AFTER_12, fades(0.9), fades(0.1, moves=0.1)) == "no answer"


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        (["for", "for"], "holds"),
        (["against", "against"], "does not hold"),
        (["alike", "against"], "does not hold"),
        (["alike", "alike"], "does not hold"),
        (["for", "against"], "undecided"),
        (["for", "alike"], "undecided"),
        (["for", "no answer"], "undecided"),
        (["against", "no answer"], "undecided"),
        (["for"], "holds"),
    ],
)
def test_verdict_of_seeds(outcomes: list[Outcome], expected: str) -> None:
    assert verdict(outcomes) == expected
    assert verdict(outcomes[::-1]) == expected


def test_a_verdict_needs_seeds() -> None:
    with pytest.raises(ValueError, match="no seeds"):
        verdict([])


def test_a_conclusion_is_judged_by_its_own_models_and_figure() -> None:
    (table_2,) = (conclusion for conclusion in CONCLUSIONS if conclusion.place == "Table 2")
    assert {c.better for c in CONCLUSIONS} | {c.worse for c in CONCLUSIONS} == BY_NAME.keys()
    seed = {"full": measured(grounding=5.0), "no_matching": measured(grounding=30.0)}
    other = {"full": measured(grounding=5.0), "no_matching": measured(grounding=5.0)}
    holds = judge(table_2, {0: seed, 1: seed}, {0: REAL, 1: REAL})
    assert holds.verdict == "holds"
    assert (holds.decided[1].better, holds.decided[1].worse) == (5.0, 30.0)
    assert judge(table_2, {0: seed, 1: other}, {0: REAL, 1: REAL}).verdict == "undecided"


def test_fading_of_a_clip_that_comes_to_rest() -> None:
    """Steps of 0.2 within the first 6 frames, then of 0.05."""
    steps = torch.tensor([0.2] * 5 + [0.05] * 10)
    frames = torch.cat([torch.zeros(1), steps.cumsum(0)])
    video = frames.view(1, 16, 1, 1, 1).expand(2, 16, 3, 4, 4)
    assert fading(video, 6) == pytest.approx(0.25)
    assert fading(video, 12) == pytest.approx(0.05 / ((5 * 0.2 + 6 * 0.05) / 11))
    at_rest = torch.cat([video[:, :15], video[:, 14:15]], 1)  # for the last of four steps
    assert fading(at_rest, 12) == pytest.approx(0.75 * fading(video, 12))
    assert fading(torch.zeros_like(video), 6) == 1


# The whole of it.


def test_a_plan_is_kept_and_another_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "count", lambda: dict.fromkeys([STAGE_1, *BY_NAME], 1e12))
    settings = Settings.of(40.0, quick=False)
    plan = settle(tmp_path, settings)
    assert plan.iterations["full"] == int(budget_for(40.0).stage_2 // 1e12)
    monkeypatch.setattr(plans, "count", lambda: pytest.fail("counted again"))
    assert settle(tmp_path, settings) == plan
    with pytest.raises(UserError, match="other settings"):
        settle(tmp_path, Settings.of(50.0, quick=False))
    monkeypatch.setitem(plans._TRAINING, "log_every", 1)  # no part of a model
    assert settle(tmp_path, settings) == plan
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        settle(tmp_path, settings)


def test_jobs_share_stage_1_and_seeds_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "count", lambda: dict.fromkeys([STAGE_1, *BY_NAME], 1e12))
    plan = settle(tmp_path, Settings.of(40.0, quick=False))
    jobs = jobs_of(plan, seed=3)
    assert len(jobs) == 1 + len(MODELS) + 1
    shared = str(folder_of(tmp_path, 3, "stage-1"))
    given = [job for job in jobs if "--previous" in job.command]
    assert len(given) == sum(model.shares_stage_1 for model in MODELS)
    assert {job.command[job.command.index("--previous") + 1] for job in given} == {shared}
    assert jobs[0].command[jobs[0].command.index("--out") + 1] == shared
    for model in MODELS:
        config = plan.config(model, seed=3)
        assert {stage.training.seed for stage in config.stages.values()} == {3}
        iterations = config.stages[model.stage_number].training.iterations
        assert iterations == plan.iterations[model.name]


def test_options_are_checked(tmp_path: Path) -> None:
    assert "--seeds must be" in call(miniature.main, "--seeds", "0").error
    assert "--minutes must be" in call(miniature.main, "--minutes", "5").error


def python_jobs(folder: Path, *codes: str) -> list[Job]:
    return [Job(f"job {n}", ("-c", code), folder / f"{n}.log") for n, code in enumerate(codes)]


def test_jobs_run_in_order_with_one_thread_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second finds what the first one wrote; seeds have logs of their own."""
    note = "import os, pathlib; pathlib.Path({0!r}).write_text(os.environ['OMP_NUM_THREADS'])"
    read = "import pathlib; print('found', pathlib.Path({0!r}).read_text())"
    jobs = {}
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        codes = (code.format(str(folder / "note")) for code in (note, read))
        jobs[seed] = python_jobs(folder, *codes)
    monkeypatch.setattr(miniature, "jobs_of", lambda plan, seed: jobs[seed])
    miniature.carry_out(tiny_plan(tmp_path), [0, 1], miniature.Clock())
    for seed in (0, 1):
        assert (tmp_path / str(seed) / "1.log").read_text() == "found 1\n"


def test_one_that_fails_stops_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed 1 would sleep for longer than a test may take, and then go on to another job."""
    begun, not_reached = tmp_path / "begun", tmp_path / "not-reached"
    sleep = f"import pathlib, time; pathlib.Path({str(begun)!r}).touch(); time.sleep(1000)"
    touch = f"import pathlib; pathlib.Path({str(not_reached)!r}).touch()"
    fail = (
        f"import pathlib, sys, time\n"
        f"while not pathlib.Path({str(begun)!r}).exists(): time.sleep(0.01)\n"
        f"sys.exit(3)"
    )
    jobs = {}
    for seed, codes in enumerate([(fail, touch), (sleep, touch)]):
        folder = tmp_path / str(seed)
        folder.mkdir()
        jobs[seed] = python_jobs(folder, *codes)
    monkeypatch.setattr(miniature, "jobs_of", lambda plan, seed: jobs[seed])
    with pytest.raises(UserError, match=r"(?s)exit code 3: .*0\.log"):
        miniature.carry_out(tiny_plan(tmp_path), [0, 1], miniature.Clock())
    assert not not_reached.exists()


def trained_once(train: Callable[..., Classifier]) -> Callable[..., Classifier]:
    """The classifier of the same clips again, as tests/evaluation/test_classifier.py finds it."""
    trained: dict[tuple[Any, ...], Classifier] = {}

    def train_or_take(
        video_BTCHW: Tensor, labels_B: Tensor, view: View, *, seed: int
    ) -> Classifier:
        key = video_BTCHW.numpy().tobytes(), labels_B.numpy().tobytes(), view, seed
        if key not in trained:
            trained[key] = train(video_BTCHW, labels_B, view, seed=seed)
        return trained[key]

    return train_or_take


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Titles of the jobs that are started: here, in this process, which spares their start-up."""
    titles: list[str] = []

    def carry_out(plan: MiniaturePlan, seeds: list[int], clock: miniature.Clock) -> None:
        for seed in seeds:
            for job in jobs_of(plan, seed):
                titles.append(job.title)
                script, *arguments = job.command
                if script == "-m":
                    assert arguments.pop(0) == "benchmarks.miniature.measuring"
                    finished = call(measuring.main, *arguments)
                else:
                    finished = call(engine.train.main, *arguments)
                assert finished.code == 0, finished.out + finished.err

    monkeypatch.setattr(miniature, "carry_out", carry_out)
    return titles


@pytest.mark.long
def test_quickly_from_end_to_end_and_again(
    tmp_path: Path,
    started: list[str],
    flops: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plans, "count", lambda: flops)
    monkeypatch.setattr(evaluating, "weights_path", lambda: tmp_path / "no-such-file")
    monkeypatch.setattr(measuring, "train_classifier", trained_once(measuring.train_classifier))
    out, copies = tmp_path / "out", tmp_path / "copies"
    options = ("--quick", "--seeds", "1", "--out", out, "--commit-to", copies)
    first = call(miniature.main, *options)
    assert first.code == 0, first.out + first.err
    assert len(started) == 1 + len(MODELS) + 1
    assert (copies / "picture.png").read_bytes().startswith(b"\x89PNG")
    table = (copies / "table.md").read_text()
    tree = json.loads((copies / "figures.json").read_text())
    for conclusion, found in zip(CONCLUSIONS, tree["verdicts"], strict=True):
        assert f"| {conclusion.place} | {conclusion.claim} |" in table
        assert found["verdict"] in ("holds", "does not hold", "undecided")
    found = tree["seeds"]["0"]
    for model in MODELS:
        one = found["models"][model.name]
        assert (one["grounding"] is None) == model.single_stage
        assert all(math.isfinite(value) for value in one["spectral_distances"])
    assert found["real"]["spectral_distances"] == [0.0] * 4
    assert found["real"]["motion"] == 1
    assert found["real_frozen"]["motion"] == 0
    assert "Not measured: no I3D weights" in table
    assert tree["evaluation"] is None
    check_training(out)
    # What was trained and measured is not touched again.
    files = {file: file.stat().st_mtime_ns for file in (out / "seed-0").rglob("*")}
    started.clear()
    again = call(miniature.main, *options)
    assert again.code == 0, again.out + again.err
    assert not started
    assert {file: file.stat().st_mtime_ns for file in (out / "seed-0").rglob("*")} == files
    assert (out / "table.md").read_text() == table
    check_evaluation(out, options, monkeypatch)
    # A measurement that is lost is made again, of what is trained, and comes out the same.
    table = (out / "table.md").read_text()
    (out / "seed-0" / "window3" / "figures.json").unlink()
    assert call(miniature.main, *options).code == 0
    assert started == ["measuring 1 model"]
    assert (out / "table.md").read_text() == table


def check_evaluation(out: Path, options: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a network the second table comes too; what was evaluated is not evaluated again."""
    network = PlainNetwork(least_frames=9)
    monkeypatch.setattr(evaluating, "weights_path", lambda: out / "plan.json")
    monkeypatch.setattr(evaluating.I3DNetwork, "load", lambda path, device: network)
    again = call(miniature.main, *options)
    assert again.code == 0, again.out + again.err
    shown = sum(shape[0] for shape in network.shown)
    assert shown == 8 * (len(MODELS) + 4)  # 8 real clips, 8 others, these spoilt in two ways
    found = json.loads((out / "figures.json").read_text())["evaluation"]
    for model in MODELS:
        assert all(math.isfinite(v) for v in found["seeds"]["0"][model.name]["values"].values())
        assert {ranks[model.name] for ranks in found["ranks"].values()} <= {1, 2, 3, 4, 5, 6}
    assert found["controls"]["motion"]["real-frozen"] == 0
    assert "known by motion" in found["between_seeds"]
    network.shown.clear()
    (out / "seed-0" / "joint" / "evaluation.json").unlink()
    table = (out / "table.md").read_text()
    assert call(miniature.main, *options).code == 0
    assert not network.shown  # the features are kept
    assert (out / "table.md").read_text() == table


def check_training(out: Path) -> None:
    """Each model is trained for as long as planned, and stage 1 is the shared one, bit for bit."""
    iterations = json.loads((out / "plan.json").read_text())["iterations"]
    shared = find_checkpoint(out / "seed-0" / "stage-1")
    assert shared.step == iterations[STAGE_1]
    first = shared.generators()[1]
    for model in MODELS:
        checkpoint = find_checkpoint(out / "seed-0" / model.name)
        assert (checkpoint.stage_number, checkpoint.step) == (
            model.stage_number,
            iterations[model.name],
        )
        used = checkpoint.generators()[1]
        is_same = used.keys() == first.keys() and all(
            torch.equal(used[key], first[key]) for key in first
        )
        assert is_same == model.shares_stage_1, model.name
