"""Checkpoints: whole or not there, and checked when read. test_planted_pickles.py has the rest."""

import json
import re
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import forge_meta, write_small
from small_runs import Tiny, contents, differences, full_disk, logged, sample, small_disk

from engine.errors import UserError
from engine.trainer import checkpoints
from engine.trainer.checkpoint_meta import FORMAT
from engine.trainer.checkpoints import (
    META,
    find_checkpoint,
    open_checkpoint,
    read_tensors,
    sha256,
    write_tensors,
)
from engine.trainer.retention import keep_newest_and_best

D_SHARD, G_SHARD = "discriminators-00000.pt", "generator-00000.pt"
FILES = (D_SHARD, G_SHARD, "generator.pt", "rank-00000.pt")


def newest(run: Path, stage: int = 1) -> Path:
    return run / f"stage{stage}" / "checkpoints" / "step-00000002"


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def make_unreadable(file: Path) -> None:
    """Reading it is an input/output error, as on a broken disk, and for root too."""
    file.unlink()
    file.symlink_to("/proc/self/mem")  # whose first page is never there


DAMAGES: list[Callable[[Path], None]] = [flip_a_bit, truncate, Path.unlink]


# Whole or not there


def test_files_are_on_the_disk_before_they_have_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power failure could leave the folder with empty files in it."""
    put: list[Path] = []
    monkeypatch.setattr(checkpoints, "put_on_disk", put.append)
    monkeypatch.setattr(Path, "rename", lambda path, final: put.append(final))

    final = write_small(tmp_path, 1)
    partial = final.with_name(final.name + checkpoints.PARTIAL)
    assert set(put[:-4]) == {partial / name for name in FILES}
    assert put[-4:] == [partial / META, partial, final, tmp_path]


def test_an_interrupted_write_is_ignored_and_cleaned_up(tiny: Tiny, run: Path) -> None:
    half = run / "stage1/checkpoints/step-00000007.partial"
    shutil.copytree(newest(run), half)
    assert find_checkpoint(run, stage_number=1).step == 2
    checkpoint = tiny.trained(1, run, "--max-steps", "3")
    assert checkpoint.name == "step-00000003"
    names = sorted(path.name for path in (run / "stage1/checkpoints").iterdir())
    assert names == ["step-00000001", "step-00000002", "step-00000003"]


def test_a_write_that_fails_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    def write(value: int, fail: bool) -> Path:
        def end() -> None:
            if fail:
                raise OSError("disk full")

        return write_small(tmp_path, 5, value, last=end)

    path = write(1, fail=False)
    with pytest.raises(UserError, match=f"cannot write {path}: disk full"):
        write(2, fail=True)
    with full_disk(100), pytest.raises(UserError, match=f"cannot write {path}: File too large"):
        write(2, fail=False)
    assert open_checkpoint(path).read("generator.pt") == {"value": 1}
    write(3, fail=False)
    assert open_checkpoint(path).read("generator.pt") == {"value": 3}


def test_a_full_disk_loses_nothing(tiny: Tiny, run: Path, tmp_path: Path) -> None:
    """Wherever the run meets it: with space, the same command goes on from the last checkpoint."""
    every_step = ("training.sample_every=1", "training.checkpoint_every=1")
    command = ("--max-steps", "4", "--set", every_step[0], "--set", every_step[1])
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(run, undisturbed)
    expected = contents(tiny.trained(1, undisturbed, *command))
    folder = run / "stage1"
    for free_bytes, file in (
        ((folder / "log.jsonl").stat().st_size + 100, "log.jsonl"),
        (7_000, "samples/step-00000003.mp4"),
        (20_000, "checkpoints/step-00000003"),
    ):
        with full_disk(free_bytes):
            error = tiny.train(1, run, *command).error
        assert error == f"error: cannot write {folder / file}: File too large"
        open_checkpoint(newest(run)).verify()
    assert differences(contents(tiny.trained(1, run, *command)), expected) == []
    assert [line["step"] for line in logged(folder)] == [1, 2, 3, 4]


def test_what_was_never_finished_is_gone_before_anything_is_written(tiny: Tiny, run: Path) -> None:
    """It may be what fills the disk, and the log is written long before the next checkpoint."""
    checkpoints = run / "stage1/checkpoints"
    shutil.copytree(newest(run), checkpoints / "step-00000003.partial")
    (checkpoints / "best.partial").symlink_to("step-00000001")  # cut off before it was `best`
    with full_disk(7_000):
        assert "cannot write" in (error := tiny.train(1, run, "--max-steps", "3").error)
    assert "samples/step-00000003.mp4" in error  # it did not come as far as a checkpoint
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == ["step-00000001", "step-00000002"]
    tiny.trained(1, run, "--max-steps", "3")


def test_no_space_is_told_before_anything_is_written(
    tiny: Tiny, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, usage = run / "stage1/checkpoints", shutil.disk_usage(run)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000))
        error = tiny.train(1, run, "--max-steps", "3").error
    told = re.fullmatch(
        f"error: cannot write {checkpoints}/step-00000003: it takes (.+) MB, and its disk has "
        "0.0 MB left; free some space, and the same command goes on",
        error,
    )
    assert told is not None, error
    written = sum(file.stat().st_size for file in newest(run).iterdir())
    assert 0.3 * written < 1e6 * float(told[1]) <= written  # files of such tiny tensors hold names
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == ["step-00000001", "step-00000002"]
    tiny.trained(1, run, "--max-steps", "3")


def test_a_disk_that_is_full_of_an_unfinished_checkpoint(
    tiny: Tiny, run: Path, tmp_path: Path
) -> None:
    """A real one: the same command makes room itself."""
    size = sum(file.stat().st_size for file in run.rglob("*") if file.is_file())
    disk = tmp_path / "disk"
    with small_disk(disk, 4 * size + 2**20):
        shutil.copytree(run, disk, dirs_exist_ok=True)
        partial = disk / "stage1/checkpoints/step-00000003.partial"
        partial.mkdir()
        with pytest.raises(OSError, match="No space left"):
            (partial / "half").write_bytes(bytes(4 * size + 2**20))
        assert shutil.disk_usage(disk).free == 0
        assert tiny.trained(1, disk, "--max-steps", "3").name == "step-00000003"


def test_a_full_disk_leaves_no_half_of_the_frozen_stages(
    tiny: Tiny, run: Path, tmp_path: Path
) -> None:
    """Neither where they are made nor where they are copied."""
    for source in (("--previous", run), ("--resume", newest(run, 2))):
        command = ("--max-steps", "3", *source)
        previous = tmp_path / source[0] / "stage2/previous.pt"
        with full_disk(7_000):
            error = tiny.train(2, tmp_path / source[0], *command).error
        assert f"cannot write {previous}.partial: File too large" in error
        assert not previous.exists()
        tiny.trained(2, tmp_path / source[0], *command)


def test_tensors_on_a_full_disk(tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    with full_disk(100), pytest.raises(UserError, match=f"cannot write {file}: File too large"):
        write_tensors(file, {"a": torch.zeros(9)})
    assert not file.exists()


def test_meta_lists_every_file_with_its_hash(cascade_run: Path) -> None:
    checkpoint = open_checkpoint(newest(cascade_run, 2))
    on_disk = {str(p.relative_to(checkpoint.path)) for p in checkpoint.path.rglob("*.*")}
    assert set(checkpoint.meta.files) == on_disk - {META}
    assert set(FILES) == set(checkpoint.meta.files)
    for name, (size, digest) in checkpoint.meta.files.items():
        assert (checkpoint.path / name).stat().st_size == size
        assert sha256(checkpoint.path / name) == digest
    assert not list(checkpoint.path.rglob("*.py"))
    assert (checkpoint.step, checkpoint.stage_number, checkpoint.world_size) == (2, 2, 1)


def test_meta_holds_the_configuration(tiny: Tiny, cascade_run: Path) -> None:
    trained = open_checkpoint(newest(cascade_run)).config()
    assert trained == tiny.config("training.checkpoint_every=1")


def test_find_checkpoint_takes_the_newest_of_the_last_stage(cascade_run: Path) -> None:
    assert find_checkpoint(cascade_run).path == newest(cascade_run, 2)
    assert find_checkpoint(cascade_run, stage_number=1).path == newest(cascade_run, 1)
    assert find_checkpoint(cascade_run / "stage1").path == newest(cascade_run, 1)
    older = newest(cascade_run).with_name("step-00000001")
    assert find_checkpoint(older).path == older


def test_other_formats_are_refused(run: Path) -> None:
    file = newest(run) / META
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    with pytest.raises(UserError, match=f"has checkpoint format 99; this version reads {FORMAT}"):
        open_checkpoint(newest(run))


# Checked when read


@pytest.mark.parametrize(
    ("name", "damage"),
    [*product(FILES, DAMAGES), *product([META], [flip_a_bit, truncate, Path.unlink])],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_damage_is_found_and_the_older_checkpoint_taken(
    tiny: Tiny, run: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(newest(run) / name)

    refused = tiny.train(1, run, "--max-steps", "3", "--resume", newest(run))
    assert str(newest(run)) in refused.error
    if name != META:  # a folder without it is no checkpoint at all
        assert f"is damaged: {name} " in refused.error

    finished = tiny.train(1, run, "--max-steps", "3")
    assert finished.code == 0, finished.err
    assert f"{newest(run)}" in finished.out
    assert "trying an older one" in finished.out
    assert f"resumed: {newest(run).with_name('step-00000001')}, step 1" in finished.out
    assert [line["step"] for line in logged(run / "stage1")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda meta: meta.pop("world_size"), "missing key world_size"),
        (lambda meta: meta.update(step="2"), "step should be a valid integer"),
        (lambda meta: meta.update(stage=-1), "stage should be greater than"),
        (lambda meta: meta.update(more=1), "unknown key more"),
        (lambda meta: meta.update(files={}), "discriminators-00000.pt is odd or missing"),
        (lambda meta: meta["files"].update({"../x": [1, "0" * 64]}), "../x is odd or missing"),
        (lambda meta: meta["files"].update({"generator.pt": [1, "0"]}), "files.generator.pt.1"),
        (lambda meta: meta.update(world_size=3), "discriminators-00001.pt is odd or missing"),
        (lambda meta: meta.update(evaluation={"metric": "fvd"}), "missing key evaluation."),
    ],
)
def test_a_forged_description_is_told_in_one_line(
    tiny: Tiny, run: Path, change: Callable[[dict[str, Any]], object], problem: str
) -> None:
    """Its own hash is right, so only its form tells; the older checkpoint is taken."""
    forge_meta(newest(run), change)
    with pytest.raises(UserError) as caught:
        open_checkpoint(newest(run))
    assert str(caught.value).startswith(f"checkpoint {newest(run)} is damaged: meta.json: ")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)
    finished = tiny.train(1, run, "--max-steps", "3")
    assert f"resumed: {newest(run).with_name('step-00000001')}, step 1" in finished.out


def test_a_changed_step_is_no_other_checkpoint(run: Path) -> None:
    """By its own hash, whatever stands there."""
    file = newest(run) / META
    file.write_text(file.read_text().replace('"step": 2', '"step": 6'))
    with pytest.raises(UserError, match=r"is damaged: meta\.json has changed"):
        open_checkpoint(newest(run))


def test_a_link_to_another_runs_checkpoint_is_no_candidate(
    tiny: Tiny, run: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.move(newest(run), elsewhere)
    newest(run).symlink_to(elsewhere)
    assert find_checkpoint(run, stage_number=1).step == 1
    assert "step-00000001, step 1" in tiny.train(1, run, "--max-steps", "2").out


def test_lost_checkpoints_are_not_started_over_silently(
    tiny: Tiny, run: Path, cascade_run: Path
) -> None:
    """The log stays until it is told to go, and then it is still there."""
    folder = run / "stage1"
    shutil.rmtree(folder / "checkpoints")
    log = (folder / "log.jsonl").read_text()
    error = tiny.train(1, run, "--max-steps", "1").error
    assert f"{folder} has a log up to step 2 and no checkpoint to go on from" in error
    assert (folder / "log.jsonl").read_text() == log
    anew = tiny.train(1, run, "--max-steps", "1", "--resume", "none")
    assert anew.code == 0, anew.err
    assert f"the log of an earlier run is now {folder / 'log-1.jsonl'}" in anew.out
    assert (folder / "log-1.jsonl").read_text() == log
    assert [line["step"] for line in logged(folder)] == [1]


def test_a_first_checkpoint_that_was_cut_off_is_told(tiny: Tiny, tmp_path: Path) -> None:
    half = tmp_path / "stage1" / "checkpoints" / "step-00000001.partial"
    half.mkdir(parents=True)
    error = tiny.train(1, tmp_path, "--max-steps", "1").error
    assert "has step-00000001.partial, which is not whole and no checkpoint" in error
    assert tiny.train(1, tmp_path, "--max-steps", "1", "--resume", "none").code == 0
    assert not half.exists()


@pytest.mark.parametrize("name", FILES)
def test_an_older_checkpoint_is_taken_for_one_that_cannot_be_read(
    tiny: Tiny, run: Path, name: str
) -> None:
    file = newest(run) / name
    make_unreadable(file)
    size = file.stat().st_size
    forge_meta(newest(run), lambda meta: meta["files"][name].__setitem__(0, size))
    problem = f"cannot read {file}: Input/output error"
    assert problem in tiny.train(1, run, "--max-steps", "3", "--resume", newest(run)).error
    finished = tiny.train(1, run, "--max-steps", "3")
    assert finished.code == 0, finished.err
    assert f"{problem}; trying an older one" in finished.out


def test_a_file_that_cannot_be_looked_at(run: Path) -> None:
    file = newest(run) / "generator.pt"
    file.unlink()
    file.symlink_to("x" * 300)  # as in a folder that this user may not enter, but for root too
    with pytest.raises(UserError, match=f"cannot read {file}: File name too long"):
        open_checkpoint(newest(run)).verify()


def test_frozen_stages_that_cannot_be_read(tiny: Tiny, run: Path, tmp_path: Path) -> None:
    previous = run / "stage2/previous.pt"
    make_unreadable(previous)
    problem = f"cannot read {previous}: Input/output error"
    assert problem in tiny.train(2, run, "--max-steps", "3").error
    assert problem in sample("--checkpoint", run, "--out", tmp_path / "s").error


def test_tensors_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"cannot read {tmp_path}: Is a directory"):
        read_tensors(tmp_path)


def test_no_undamaged_checkpoint_is_an_error_not_a_fresh_start(tiny: Tiny, run: Path) -> None:
    for checkpoint in (run / "stage1/checkpoints").iterdir():
        flip_a_bit(checkpoint / "generator.pt")
    error = tiny.train(1, run, "--max-steps", "3").error
    assert f"no undamaged checkpoint in {run / 'stage1/checkpoints'}" in error


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_a_damaged_previous_stage_is_refused(
    tiny: Tiny, run: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    damage(newest(run) / "generator.pt")
    error = tiny.train(2, tmp_path / "new", "--previous", run).error
    assert "generator.pt" in error
    assert not (tmp_path / "new/stage2/previous.pt").exists()


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_damaged_frozen_stages_are_refused(
    tiny: Tiny, run: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """previous.pt is part of what stage 2 was trained on: neither resumed nor sampled without."""
    damage(run / "stage2/previous.pt")
    assert "previous.pt" in sample("--checkpoint", run, "--out", tmp_path / "s").error
    if damage is not Path.unlink:  # train.py makes a missing one again, from stage 1
        assert "previous.pt" in tiny.train(2, run, "--max-steps", "3").error


def test_other_frozen_stages_are_not_put_in_place(tiny: Tiny, run: Path) -> None:
    """Stage 1 has gone on since: what is made of it is refused, and does not stay in the way."""
    previous = run / "stage2/previous.pt"
    previous.unlink()
    tiny.trained(1, run, "--max-steps", "3")
    error = tiny.train(2, run, "--max-steps", "3").error
    assert f"previous.pt.partial is damaged, or not what {newest(run, 2)} was trained" in error
    assert not previous.exists()
    tiny.trained(2, run, "--max-steps", "3", "--previous", newest(run))


# Resuming what is not this run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["stages.1.generator.channels=8"], "stages.1.generator than"),
        (["stages.1.discriminators.channels=8"], "stages.1.discriminators than"),
        (["data.num_classes=3"], "was trained with data.num_classes=2"),
        (["training.ema_decay=0.9"], "was written without ema_decay"),
        (["training.seed=1"], "seed differs"),
        (["data.horizontal_flip=true"], "horizontal_flip differs"),
    ],
    ids=str,
)
def test_another_configuration_is_not_resumed(
    tiny: Tiny, run: Path, changes: list[str], message: str
) -> None:
    before = contents(newest(run))
    options = [part for change in changes for part in ("--set", change)]
    assert message in tiny.train(1, run, "--max-steps", "3", *options).error
    assert differences(before, contents(newest(run))) == []


def test_an_average_is_not_lost(tiny: Tiny, tmp_path: Path) -> None:
    """Going on without it would drop it, and the last checkpoint that has it in time."""
    tiny.trained(1, tmp_path, "--max-steps", "1", "--set", "training.ema_decay=0.5")
    assert "was written with ema_decay 0.5; resume with --set stages.1.training.ema_decay=0.5" in (
        tiny.train(1, tmp_path, "--max-steps", "2").error
    )


def test_windows_of_another_origin_are_not_resumed(tiny: Tiny, run: Path, tmp_path: Path) -> None:
    error = tiny.train(2, run, "--max-steps", "3", "--condition-on", "data").error
    assert "was trained with condition_on=generated; resume with --condition-on generated" in error
    out = tmp_path / "data"
    tiny.trained(2, out, "--max-steps", "1", "--condition-on", "data")
    error = tiny.train(2, out, "--previous", run).error
    assert "was trained with condition_on=data; resume with --condition-on data" in error


def test_checkpoints_are_not_overwritten_by_a_fresh_start(tiny: Tiny, run: Path) -> None:
    before = contents(newest(run))
    error = tiny.train(1, run, "--resume", "none").error
    assert f"{run / 'stage1'} already holds checkpoints up to step-00000002" in error
    assert differences(before, contents(newest(run))) == []


def test_a_stage_is_resumed_from_its_own_checkpoint_only(tiny: Tiny, run: Path) -> None:
    error = tiny.train(2, run, "--resume", newest(run)).error
    assert f"{newest(run)} is of stage 1, not 2" in error


# Going on from an older one


def test_an_older_checkpoint_is_not_resumed_among_newer_ones(
    tiny: Tiny, run: Path, tmp_path: Path
) -> None:
    """Its successors would stand among them, and --resume auto would go on from the newest."""
    older = newest(run).with_name("step-00000001")
    error = tiny.train(1, run, "--max-steps", "3", "--resume", older).error
    assert f"{run / 'stage1'} holds checkpoints up to step-00000002, newer than {older}" in error
    assert "another --out, or remove the newer ones" in error
    # Both remedies work.
    elsewhere = tiny.trained(1, tmp_path / "elsewhere", "--max-steps", "3", "--resume", older)
    assert elsewhere.name == "step-00000003"
    shutil.rmtree(newest(run))
    assert tiny.trained(1, run, "--max-steps", "3", "--resume", older).name == "step-00000003"


def test_the_checkpoint_just_written_is_never_deleted(tmp_path: Path) -> None:
    def write(step: int) -> Path:
        written = write_small(tmp_path, step)
        keep_newest_and_best(written, 2)
        return written

    for step in (100, 200, 300, 150):
        assert write(step).is_dir()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000150", "step-00000300"]


def test_folders_of_other_names_are_left_alone(tiny: Tiny, run: Path) -> None:
    """A user's copies are neither found, nor in the way, nor deleted."""
    copies = run / "stage2.bak", run / "stage1/checkpoints/step-00000009.bak"
    shutil.copytree(run / "stage2", copies[0])
    shutil.copytree(newest(run), copies[1])
    assert find_checkpoint(run).path == newest(run, 2)
    assert find_checkpoint(run, stage_number=1).path == newest(run)
    keep_one = ("--set", "training.keep_checkpoints=1")
    assert tiny.trained(1, run, "--max-steps", "3", *keep_one)
    assert sorted(p.name for p in copies[1].parent.iterdir()) == ["step-00000003", copies[1].name]
    assert copies[0].is_dir()
