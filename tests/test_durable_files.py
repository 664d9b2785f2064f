"""A file has its name only when its content is on the disk."""

from pathlib import Path

import pytest

from engine import durable_files
from engine.durable_files import put_in_place


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
