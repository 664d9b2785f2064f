"""A file has its name only when its content is on the disk; a disk that refuses is one line."""

import errno
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import full_disk

from engine import durable_files
from engine.durable_files import put_in_place, reading, writing
from engine.errors import UserError
from engine.trainer.checkpoints import save_tensors


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


def older_format(path: Path, value: Any) -> None:
    """As DeepSpeed saves."""
    torch.save(value, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("name", ["ascii.pt", "nicht-äscii.pt"])
@pytest.mark.parametrize("save", [save_tensors, older_format])
def test_what_torch_save_hides(
    tmp_path: Path, save: Callable[[Path, Any], None], name: str
) -> None:
    """Wherever in the file the disk gets full: in a tensor, in the table of contents."""
    path = tmp_path / name
    value = {"a": torch.zeros(100_000), "b": torch.zeros(10)}
    save(path, value)
    size = path.stat().st_size
    for missing in (size, size // 2, 600, 1):
        with pytest.raises(UserError) as raised, writing(path), full_disk(size - missing):
            save(path, value)
        assert str(raised.value) == f"cannot write {path}: File too large"


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    line = f"^cannot write {tmp_path}: Is a directory$"
    with pytest.raises(UserError, match=line), writing(tmp_path):
        save_tensors(tmp_path, {})


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
