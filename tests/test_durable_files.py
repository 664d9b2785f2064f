"""A file has its name only when its content is on the disk; a disk that refuses is one line."""

import errno
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from small_runs import full_disk

from engine import durable_files
from engine.durable_files import put_in_place, reading, writing
from engine.errors import UserError


def test_content_then_name_then_the_folders_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put: list[tuple[Path, bool]] = []
    partial, path = tmp_path / "file.partial", tmp_path / "file"
    monkeypatch.setattr(durable_files, "put_on_disk", lambda p: put.append((p, path.exists())))
    partial.write_text("whole")
    put_in_place(partial, path)
    assert put == [(partial, False), (tmp_path, True)]
    assert path.read_text() == "whole"


@pytest.mark.parametrize("name", ["ascii.pt", "nicht-äscii.pt"])
@pytest.mark.parametrize("older_format", [False, True])
def test_what_torch_save_hides(tmp_path: Path, name: str, older_format: bool) -> None:
    """Wherever in the file the disk gets full: in a tensor, in the table of contents."""
    path = tmp_path / name

    def save() -> None:
        value = {"a": torch.zeros(100_000), "b": torch.zeros(10)}
        torch.save(value, path, _use_new_zipfile_serialization=not older_format)

    save()
    size = path.stat().st_size
    told = name != "ascii.pt" or older_format
    reason = "File too large" if told else "the disk or a quota is full, or the disk is broken"
    for missing in (size, size // 2, 600, 1):
        with pytest.raises(UserError) as raised, writing(path), full_disk(size - missing):
            save()
        assert str(raised.value) == f"cannot write {path}: {reason}"


def test_torch_save_tells_why_it_cannot_open(tmp_path: Path) -> None:
    line = f"^cannot write {tmp_path}: Is a directory$"
    with pytest.raises(UserError, match=line), writing(tmp_path):
        torch.save({}, tmp_path)


@pytest.mark.parametrize("checked", [writing, reading])
def test_errors_of_the_system(
    checked: Callable[[Path], AbstractContextManager[None]], tmp_path: Path
) -> None:
    verb = "write" if checked is writing else "read"
    for error, reason in (
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError("Writer is closed"), "Writer is closed"),
    ):
        line = f"^cannot {verb} {tmp_path}: {reason}$"
        with pytest.raises(UserError, match=line), checked(tmp_path):
            raise error


@pytest.mark.parametrize("defect", [RuntimeError("CUDA error"), ValueError("x"), UserError("y")])
def test_other_errors_stay_as_they_are(tmp_path: Path, defect: Exception) -> None:
    with pytest.raises(type(defect)) as raised, writing(tmp_path):
        raise defect
    assert raised.value is defect
