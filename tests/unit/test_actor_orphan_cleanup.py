"""Removal of desktops whose owner was killed, by several processes at the same time."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from deskrl.actor.desktops import orphan_cleanup
from deskrl.actor.desktops.orphan_cleanup import OwnerRecord, reap_orphans


def test_a_desktop_that_another_process_removes_meanwhile_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "desktop-1"
    folder.mkdir()
    OwnerRecord(owner_pid=1, owner_start_ticks=-1, groups=()).write(folder)
    monkeypatch.setattr(orphan_cleanup, "remove_groups", lambda groups: shutil.rmtree(folder))
    reap_orphans(tmp_path)
    assert not folder.exists()
