"""train.py's command line: every mistake is one line and exit code 2, before anything starts."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forks import Forks
from small_runs import REPOSITORY, Tiny, call, environment, logged, python, two_ranks, write_tiny

import engine.train
from engine.configuration import ProceduralClips
from engine.trainer.ranks import Ranks
from engine.video.procedural import ensure_procedural

# What the options are, {…} being folders of the test's; what the line must say.
MISTAKES = [
    ([], "the following arguments are required: --stage"),
    (["--stage", "one"], "argument --stage: invalid int value: 'one'"),
    (["--stage", "1", "--steps", "5"], "unrecognized arguments: --steps 5"),
    (["--stage", "1", "--max-step", "5"], "unrecognized arguments: --max-step 5"),
    (["--stage", "1", "--max-steps", "0"], "--max-steps must be at least 1"),
    (["--stage", "1", "--condition-on", "noise"], "invalid choice: 'noise'"),
    (["--stage", "1", "--data", ""], "--data names nothing; name an index or a folder of videos"),
    (["--stage", "9"], "--stage 9: {config} has stages 1 to 2"),
    (["--stage", "0"], "--stage 0: {config} has stages 1 to 2"),
    (["--stage", "-1"], "--stage -1: {config} has stages 1 to 2"),
    (["--stage", "1", "--config", "no/such.yaml"], "no/such.yaml"),
    (["--stage", "1", "--config", "{tmp}"], "{tmp}"),
    (["--stage", "1", "--config", 300 * "x"], "xxx...: File name too long"),
    (["--stage", "1", "--resume", 300 * "x"], "xxx...: File name too long"),
    (["--stage", "1", "--set", "training.batch=4"], "training.batch"),
    (["--stage", "1", "--set", "training.micro_batch=many"], "training.micro_batch"),
    (["--stage", "1", "--set", "training.micro_batch"], "training.micro_batch"),
    (
        ["--stage", "1", "--set", "training.micro_batch=3"],
        "micro_batch 2 or 4, or global_batch 3 or 6",
    ),
    (["--stage", "1", "--set", "training.zero_stage=4"], "zero_stage"),
    (["--stage", "1", "--set", "stages.1.resolution=30"], "resolution 30 cannot be reached"),
    (["--stage", "1", "--set", "stages.7.num_frames=3"], "stages.7"),
    (["--stage", "1", "--set", "variant=large"], "no variant 'large'"),
    (["--stage", "1", "--resume", "{tmp}/nothing"], "no checkpoint of stage 1 at {tmp}/nothing"),
    (["--stage", "1", "--resume", "{tmp}"], "no checkpoint of stage 1 under {tmp}"),
    (
        ["--stage", "2"],
        "stage 2 needs stage 1 first (no checkpoint of stage 1 at {out}: no such folder); make it "
        "with: deepspeed engine/train.py --stage 1 --config {config} --out {out}",
    ),
    (
        ["--stage", "2", "--data", "{tmp}/my clips", "--set", "training.zero_stage=0"],
        "--stage 1 --config {config} --out {out} --data '{tmp}/my clips' "
        "--set training.zero_stage=0",
    ),
    (["--stage", "2", "--previous", "{tmp}"], "no checkpoint of stage 1 under {tmp}"),
]


@pytest.mark.parametrize(("options", "line"), MISTAKES, ids=lambda value: str(value)[:60])
def test_mistake_is_one_line_before_anything_starts(
    tiny: Tiny, tmp_path: Path, options: list[str], line: str
) -> None:
    out = tmp_path / "out"
    names = {"config": tiny.config_file, "tmp": tmp_path, "out": out}
    given = [option.format(**names) for option in options]
    if "--config" not in given:
        given = ["--config", str(tiny.config_file), *given]
    finished = call(engine.train.main, *given, "--out", out)
    assert line.format(**names) in finished.error
    assert finished.out == ""
    assert not out.exists()


def test_mistakes_are_found_without_loading_deepspeed(tiny: Tiny, tmp_path: Path) -> None:
    """DeepSpeed takes seconds to import and talks: a real process must not have needed it."""
    script = (
        "import runpy, sys\n"
        "path = sys.argv.pop(1)\n"
        "try:\n    runpy.run_path(path, run_name='__main__')\n"
        "finally:\n    print('deepspeed' in sys.modules, 'nvidia.dali' in sys.modules)\n"
    )
    command = [sys.executable, "-c", script, str(REPOSITORY / "engine/train.py")]
    done = subprocess.run(
        [*command, *tiny.options(9, tmp_path)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == "False False\n"
    assert done.stderr == f"error: --stage 9: {tiny.config_file} has stages 1 to 2\n"


def test_a_place_that_cannot_be_written(tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "below", Path("/proc/nothing")):
        finished = tiny.train(1, out)
        assert f"cannot write {out / 'stage1'}" in finished.error
        assert finished.out == ""
    assert file.read_text() == "mine"


# Mistakes in the data, which only opening it shows.


def test_missing_and_empty_data(tiny: Tiny, tmp_path: Path) -> None:
    missing = tmp_path / "nothing"
    error = tiny.train(1, tmp_path / "out", "--data", missing).error
    assert f"no data at {missing}" in error
    (tmp_path / "empty").mkdir()
    error = tiny.train(1, tmp_path / "out", "--data", tmp_path / "empty").error
    assert f"{tmp_path / 'empty'}" in error
    assert not (tmp_path / "out/stage1/checkpoints").exists()


def test_a_folder_of_other_files(tiny: Tiny, tmp_path: Path) -> None:
    data = tmp_path / "notes"
    data.mkdir()
    (data / "notes.txt").write_text("no video")
    assert str(data) in tiny.train(1, tmp_path / "out", "--data", data).error


def test_no_data_is_named(tiny: Tiny, tmp_path: Path) -> None:
    options = ("--set", "data.procedural=null", "--set", "data.path=null")
    error = tiny.train(1, tmp_path / "out", *options).error
    assert "no data: name an index or a folder of videos with --data PATH" in error


def test_classes_must_fit(tiny: Tiny, cascade_run: Path, tmp_path: Path) -> None:
    """`cascade_run` has made the data set, two classes."""
    options = ("--data", tiny.data, "--set", "data.num_classes=1")
    error = tiny.train(1, tmp_path / "out", *options).error
    assert "the data set has 2 classes, but data.num_classes is 1" in error
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, video in enumerate(sorted(tiny.data.glob("*/*.*"))[:3]):
        shutil.copy(video, flat / f"{number}{video.suffix}")
    error = tiny.train(1, tmp_path / "out", "--data", flat).error
    assert "data.num_classes is 2, but the data set has no class folders" in error
    # What the line advises works, and the classes are gone from the log's name list.
    assert "--set data.num_classes=null" in error
    advised = ("--data", flat, "--set", "data.num_classes=null", "--max-steps", "1")
    checkpoint = tiny.trained(1, tmp_path / "flat-run", *advised)
    assert json.loads((checkpoint / "meta.json").read_text())["classes"] == []


def test_videos_must_be_long_enough(tiny: Tiny, cascade_run: Path, tmp_path: Path) -> None:
    options = ("--data", tiny.data, "--set", "stages.1.num_frames=9")
    error = tiny.train(1, tmp_path / "out", *options).error
    assert "need 17; the longest has 16" in error


def test_more_classes_in_the_configuration_than_in_the_data(
    tiny: Tiny, cascade_run: Path, tmp_path: Path
) -> None:
    """Allowed: a part of a data set trains with the whole one's networks."""
    options = ("--data", tiny.data, "--set", "data.num_classes=5", "--max-steps", "1")
    tiny.trained(1, tmp_path / "out", *options)


# The console


def test_help_names_every_option(tiny: Tiny) -> None:
    done = python("engine/train.py", "--help")
    assert done.code == 0
    for option in ("--stage", "--config", "--data", "--set", "--out", "--resume", "--previous"):
        assert option in done.out
    assert "deepspeed engine/train.py --stage 2" in done.out


def test_console_is_ours_and_chatter_goes_to_the_log(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = python("engine/train.py", *tiny.options(1, out, "--max-steps", "2"))
    assert done.code == 0
    assert done.err == ""
    lines = [line for line in done.out.splitlines() if "sample clips in" not in line]
    checkpoint = out / "stage1/checkpoints/step-00000002"
    device = "GPU" if torch.cuda.is_available() else "CPU"
    assert lines[:4] == [
        "stage 1 of tiny: 8x8, 3 frames; fp32, ZeRO-1",
        f"batch 4 = 1 {device} x 4 samples x 1 accumulated",
        "norm statistics: over 4 samples",
        f"writes: {out / 'stage1'}",
    ]
    assert lines[4].startswith("data: 8 videos, 2 classes, MJPEG via PyAV")
    assert lines[5].startswith("stage 1: step 2/2, loss_D ")
    assert lines[6:] == [f"done: {checkpoint}"]
    assert checkpoint.is_dir()
    assert "real_accelerator" in (out / "stage1/logs/rank-00000.log").read_text()
    assert [line["step"] for line in logged(out / "stage1")] == [1, 2]
    names = {path.name for path in (out / "stage1/samples").iterdir()}
    assert names == {f"step-0000000{n}.{suffix}" for n in (0, 2) for suffix in ("mp4", "png")}
    assert list((out / "stage1/tensorboard").iterdir())


@pytest.mark.parametrize(
    ("world_size", "settings", "lines"),
    [
        (
            8,
            ("global_batch=512", "micro_batch=16"),
            "batch 512 = 8 GPUs x 16 samples x 4 accumulated\n"
            "norm statistics: over 128 samples, synchronized over 8 GPUs; accumulated "
            "micro-batches have their own",
        ),
        (
            2,
            ("global_batch=8", "synchronized_norms=false"),
            "batch 8 = 2 GPUs x 4 samples x 1 accumulated\n"
            "norm statistics: over 4 samples, not synchronized",
        ),
        (1, (), "batch 4 = 1 GPU x 4 samples x 1 accumulated\nnorm statistics: over 4 samples"),
    ],
)
def test_batch_and_norm_statistics_are_stated(
    tiny: Tiny, world_size: int, settings: tuple[str, ...], lines: str
) -> None:
    training = tiny.config(*(f"training.{setting}" for setting in settings)).stages[1].training
    ranks = Ranks(rank=0, world_size=world_size, local_rank=0, device=torch.device("cuda", 0))
    assert "\n".join(engine.train.batch_lines(training, ranks)) == lines


def test_options_without_effect_are_named(tiny: Tiny, tmp_path: Path) -> None:
    options = ("--max-steps", "1", "--condition-on", "data", "--previous", tmp_path)
    finished = tiny.train(1, tmp_path / "out", *options)
    assert finished.code == 0
    assert "note: --previous is not used: no frozen stage is needed" in finished.out
    assert "note: condition_on=data is not used: this stage upsamples no frozen" in finished.out


def test_an_unexpected_error_keeps_its_traceback(tiny: Tiny, tmp_path: Path) -> None:
    """Not a mistake of the user's: exit code 1, one line on the console, all of it in the log."""
    out = tmp_path / "out"
    finished = tiny.train(1, out, "--set", "training.generator_lr=1e38", "--max-steps", "4")
    assert finished.code == 1
    log = out / "stage1/logs/rank-00000.log"
    assert finished.out.splitlines()[-1].startswith("NonFiniteError: stage 1, step ")
    assert finished.out.splitlines()[-1].endswith(f"(traceback: {log})")
    assert finished.err == ""
    assert "Traceback (most recent call last)" in log.read_text()
    assert not (out / "stage1/checkpoints").exists()


def test_a_log_whose_disk_is_full(tiny: Tiny, tmp_path: Path) -> None:
    """What libraries say is lost, but not how the run ends."""
    log = tmp_path / "stage1/logs/rank-00000.log"
    log.parent.mkdir(parents=True)
    log.symlink_to("/dev/full")
    finished = tiny.train(1, tmp_path, "--set", "training.generator_lr=1e38", "--max-steps", "4")
    assert finished.code == 1
    assert finished.out.splitlines()[-1].endswith(f"(traceback: {log})")
    samples = tmp_path / "stage1/samples"
    shutil.rmtree(samples)
    samples.touch()
    error = tiny.train(1, tmp_path, "--max-steps", "1", "--resume", "none").error
    assert error == f"error: cannot write {samples / 'step-00000000.mp4'}: File exists"


# Two ranks


@pytest.mark.slow
def test_two_ranks_say_a_mistake_once(tiny: Tiny, forks: Forks, tmp_path: Path) -> None:
    """One found before the ranks are connected, and one found in the data by both."""
    done = two_ranks("engine/train.py", *tiny.options(1, tmp_path / "out", "--steps", "3"))
    assert done.code == 2
    assert (done.out + done.err).count("error: unrecognized arguments: --steps 3") == 1
    assert "Traceback" not in done.out + done.err

    ensure_procedural(
        tmp_path / "data", ProceduralClips(num_clips=4, num_frames=16, resolution=16), 2, print
    )
    options = ("--data", tmp_path / "data", "--set", "data.num_classes=1")
    more = ("--set", "training.micro_batch=2")
    done = forks.script(2, "engine/train.py", *tiny.options(1, tmp_path / "out", *options, *more))
    assert done.code == 2
    assert (done.out + done.err).count("the data set has 2 classes") == 1
    assert "Traceback" not in done.out + done.err


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_a_mistake_that_one_rank_meets_is_said_by_that_rank_alone(
    tiny: Tiny, forks: Forks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """The other one's broken connection is no news; it goes to its log.

    Once with a launcher, which ends the other one too, and once without.
    """
    script = "tests/trainer/one_rank_fails.py"
    options = tiny.options(1, tmp_path / "out", "--set", "training.micro_batch=2")
    if failing == 0:
        done = forks.script(2, script, *options, FAILING_RANK=failing)
    else:
        monkeypatch.setenv("FAILING_RANK", str(failing))
        done = two_ranks(script, *options)
    assert done.code == 2
    assert done.err.splitlines().count("error: a clip is spoiled; replace it") == 1
    for noise in ("onnection", "Traceback", "traceback:"):
        assert noise not in done.out + done.err
    other = tmp_path / f"out/stage1/logs/rank-0000{1 - failing}.log"
    assert other.read_text().count("another rank failed before; here: ") == 1


@pytest.mark.slow
def test_two_ranks_train_through_the_launcher(tiny: Tiny, tmp_path: Path) -> None:
    """`deepspeed --num_gpus 2 engine/train.py`, on the sample data set that rank 0 makes."""
    fresh = write_tiny(tmp_path / "fresh")
    options = ("--max-steps", "1", "--set", "training.micro_batch=2")
    done = two_ranks("engine/train.py", *fresh.options(1, tmp_path / "out", *options))
    assert done.code == 0, done.err
    assert done.out.count("done: ") == done.out.count("making ") == 1
    folder = tmp_path / "out/stage1"
    assert (folder / "checkpoints/step-00000001/rank-00001.pt").is_file()
    assert (folder / "logs/rank-00001.log").is_file()
