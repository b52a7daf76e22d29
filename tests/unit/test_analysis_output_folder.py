"""Output folders: they appear only when they are complete, and only one process writes one of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from deskrl.analysis.datasets.output_folder import output_folder
from deskrl.core.errors import UserError


def test_a_folder_appears_at_the_end_with_what_was_written(tmp_path: Path) -> None:
    with output_folder(tmp_path / "out") as folder:
        (folder.path / "data").mkdir()
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["data"]


def test_nothing_is_left_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="broken"), output_folder(tmp_path / "out"):
        raise RuntimeError("broken")
    assert list(tmp_path.iterdir()) == []


def test_a_second_writer_is_rejected_and_the_first_one_goes_on(tmp_path: Path) -> None:
    with output_folder(tmp_path / "out") as folder:
        (folder.path / "first").touch()
        with pytest.raises(UserError, match="out: another process is writing it"), output_folder(tmp_path / "out"):
            pass
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["first"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".out.partial"
    (left / "data").mkdir(parents=True)
    (left / "README.md").touch()
    with output_folder(tmp_path / "out") as folder:
        (folder.path / "new").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]
