"""Checkpoints: whole or not there at all, checked when read, and never executed.

    OUT/stage2/
        previous.pt                  the frozen earlier stages, with their norm statistics
        checkpoints/best             a link to the best one, where the run evaluates
        checkpoints/step-00001000/
            generator-00000.pt           a rank's part of the weights and of Adam's moments
            discriminators-00000.pt      the same
            generator.pt                 the generator, unsharded, for sampling and later stages
            rank-00000.pt                what else the step changes: random states, the loader's
            meta.json                    step, configuration, and every file's size and SHA-256

A checkpoint is written to `step-00001000.partial` and renamed when whole; `meta.json` comes last,
when every rank has listed its files there. `checkpoint_writer` has the ranks do that.
Files are read with `weights_only=True`: pickles are not executed. A stage's folder is all that
sampling needs: copy it anywhere.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.configuration import Config, config_from_tree
from engine.durable_files import (
    PARTIAL,
    check_space,
    put_in_place,
    put_on_disk,
    reading,
    remove_partials,
    writing,
)
from engine.errors import UserError
from engine.trainer.checkpoint_meta import (
    GENERATOR,
    CheckpointMeta,
    RunFacts,
    meta_text,
    read_meta,
)

META = "meta.json"
PREVIOUS = "previous.pt"
CHECKPOINTS = "checkpoints"
BEST = "best"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    meta: CheckpointMeta

    @property
    def step(self) -> int:
        """Generator updates done."""
        return self.meta.step

    @property
    def stage_number(self) -> int:
        """The number of the stage that was trained."""
        return self.meta.stage

    @property
    def world_size(self) -> int:
        """The number of ranks that wrote it."""
        return self.meta.world_size

    @property
    def class_counts(self) -> list[int]:
        """Training videos per class; empty without classes."""
        return list(self.meta.class_counts)

    @property
    def classes(self) -> list[str]:
        """The classes' names, by label; empty where the data set named none."""
        return list(self.meta.classes)

    @property
    def frames_per_second(self) -> float:
        """Of the videos that it makes."""
        return self.meta.frames_per_second

    @property
    def digest(self) -> str:
        """The SHA-256 of this stage's generator, by which norm statistics are told apart."""
        return self.meta.files[GENERATOR][1]

    @property
    def passes(self) -> None:
        """It brings no norm statistics (as `engine.dummy_passes.TrainedCascade` has them)."""
        return None

    def config(self) -> Config:
        """The configuration it was trained with."""
        return config_from_tree(self.meta.config, source=str(self.path / META))

    def verify(self, names: list[str] | None = None) -> None:
        """Compare files (all, or `names`) with their recorded size and hash; UserError if not."""
        for name, (size, digest) in self.meta.files.items():
            if names is not None and name not in names:
                continue
            file = self.path / name
            with reading(file):
                if not file.is_file():
                    raise UserError(f"checkpoint {self.path} is damaged: {name} is missing")
                if file.stat().st_size != size or sha256(file) != digest:
                    raise UserError(f"checkpoint {self.path} is damaged: {name} has changed")

    def verify_previous(self, path: Path) -> None:
        """UserError when `path` is not the previous.pt that it was trained with."""
        if sha256(path) != self.meta.previous:
            raise UserError(f"{path} is damaged, or not what {self.path} was trained with")

    def read(self, name: str) -> Any:
        """One of its files, checked and without executing pickles."""
        self.verify([name])
        return read_tensors(self.path / name)

    def generators(self) -> dict[int, dict[str, torch.Tensor]]:
        """State dicts of the generators of stages 1 to this one.

        This stage's are the moving averages where the run kept them; earlier stages' come from
        `previous.pt`, so they are what this stage was trained on, whatever became of them since.
        Raises UserError when one is missing or damaged.
        """
        generators: dict[int, dict[str, torch.Tensor]] = {}
        if self.stage_number > 1:
            previous = self.path.parent.parent / PREVIOUS
            if self.meta.previous and previous.exists():
                self.verify_previous(previous)
                generators |= read_tensors(previous)["generators"]
        generators |= self.read(GENERATOR)["generators"]
        missing = set(range(1, self.stage_number + 1)) - set(generators)
        if missing:
            raise UserError(
                f"{self.path}: the generator of stage {min(missing)} is not there; "
                f"{PREVIOUS} belongs beside checkpoints/ (a run with condition_on=data has none)"
            )
        return generators


def begin_checkpoint(folder: Path, step: int, *, make: bool, num_bytes: int = 0) -> Path:
    """The folder to write into: `folder/step-….partial`, which one rank makes.

    What was left of another that was not finished is removed first. Raises UserError, also where
    the disk has no room for `num_bytes`.
    """
    final = folder / step_name(step)
    partial = final.with_name(final.name + PARTIAL)
    if make:
        with writing(final):
            remove_partials(folder)
            check_space(final, num_bytes)
            partial.mkdir(parents=True)
    return partial


def list_files(partial: Path, rank: int, names: Sequence[str]) -> None:
    """Put a rank's files on the disk, and their sizes and hashes into a list beside them."""
    final = partial.with_name(partial.name.removesuffix(PARTIAL))
    with writing(final):
        files = {}
        for name in names:
            put_on_disk(partial / name)
            files[name] = (partial / name).stat().st_size, sha256(partial / name)
        path = _list_of(partial, rank)
        aside = path.with_name(path.name + PARTIAL)
        aside.write_text(json.dumps(files))
        aside.replace(path)


def lists_are_there(partial: Path, world_size: int) -> bool:
    """Whether all ranks have written their files."""
    return all(_list_of(partial, rank).is_file() for rank in range(world_size))


def finish_checkpoint(partial: Path, step: int, facts: RunFacts, world_size: int) -> Path:
    """Describe what all ranks have listed, and give the checkpoint its name: it is whole now.

    Raises UserError when something cannot be written.
    """
    final = partial.with_name(partial.name.removesuffix(PARTIAL))
    with writing(final):
        files: dict[str, tuple[int, str]] = {}
        for rank in range(world_size):
            path = _list_of(partial, rank)
            files |= {name: (size, digest) for name, (size, digest) in _read_list(path).items()}
            path.unlink()
        (partial / META).write_text(meta_text(step, facts, dict(sorted(files.items()))))
        for path in (partial / META, partial):
            put_on_disk(path)
        if final.exists():  # the same step again, after a resume from an earlier one
            shutil.rmtree(final)
        partial.rename(final)
        put_on_disk(final.parent)
    return final


def _list_of(partial: Path, rank: int) -> Path:
    return partial / f"files-{rank:05d}.json"


def _read_list(path: Path) -> dict[str, tuple[int, str]]:
    found: dict[str, tuple[int, str]] = json.loads(path.read_text())
    return found


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`; UserError when it is none, damaged, or of another format."""
    try:
        text = (path / META).read_text()
    except (OSError, ValueError):
        raise UserError(f"{path} is not a checkpoint: no readable {META}") from None
    return Checkpoint(path, read_meta(text, str(path)))


def find_checkpoint(path: Path, *, stage_number: int | None = None) -> Checkpoint:
    """The newest checkpoint at or under `path`: a checkpoint, a stage's folder or a run's.

    Raises UserError with one line when there is none (or none of `stage_number`).
    """
    wanted = f"of stage {stage_number} " if stage_number else ""
    if not path.is_dir():
        raise UserError(f"no checkpoint {wanted}at {path}: no such folder")
    if (path / META).exists():
        found = open_checkpoint(path.with_name(path.readlink().name) if path.is_symlink() else path)
    else:
        stages = (
            [path / f"stage{stage_number}"]
            if stage_number
            else reversed(_numbered_folders(path, "stage"))
        )
        newest = [p for stage in (path, *stages) for p in step_folders(stage / CHECKPOINTS)[-1:]]
        if not newest:
            raise UserError(f"no checkpoint {wanted}under {path}")
        found = open_checkpoint(newest[0])
    if stage_number and found.stage_number != stage_number:
        raise UserError(f"{found.path} is of stage {found.stage_number}, not {stage_number}")
    return found


def read_tensors(path: Path, *, mapped: bool = False) -> Any:
    """`torch.load`, on the CPU, of tensors and plain containers; executes nothing.

    With `mapped`, values are read from the disk when they are first used. Raises UserError when the
    file is missing or holds anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # unpickling a damaged or planted file can raise nearly anything
        raise UserError(f"{path} is not a file of tensors: {type(error).__name__}") from None


def save_tensors(path: Path, value: Any) -> None:
    """`torch.save`, in a file of ours: in its own it hides why it fails, or (2.11) that it does."""
    with path.open("wb") as file:
        torch.save(value, file)


def write_tensors(path: Path, value: Any) -> None:
    """`save_tensors`, aside and renamed. Raises UserError when it cannot be written."""
    partial = path.with_name(path.name + PARTIAL)
    with writing(path):
        save_tensors(partial, value)
        put_in_place(partial, path)


def sha256(path: Path) -> str:
    """The file's SHA-256, in hex; UserError when it cannot be read."""
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def step_name(step: int) -> str:
    """The name of the folder of a step's checkpoint."""
    return f"step-{step:08d}"


def step_folders(folder: Path) -> list[Path]:
    """The checkpoints in `folder` that were written to the end, oldest first."""
    return _numbered_folders(folder, "step-")


def _numbered_folders(folder: Path, prefix: str) -> list[Path]:
    """The folders by their number; one that a user put beside them (`stage2.bak`) is left out.

    So is a link, which may lead to what another run writes.
    """

    def number(path: Path) -> str:
        return path.name.removeprefix(prefix)

    numbered = [path for path in folder.glob(f"{prefix}*") if number(path).isdecimal()]
    found = [path for path in numbered if path.is_dir() and not path.is_symlink()]
    return sorted(found, key=lambda path: int(number(path)))
