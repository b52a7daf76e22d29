"""Folder of the store: which file systems are refused, and `replay.folder` with its link in the run directory."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from replay_kit import replay_config

from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.run_dir import RunDir
from deskrl.launch.run_control import delete_run
from deskrl.replay import store_folder
from deskrl.replay.store import Store
from deskrl.replay.store_folder import NETWORK_FILE_SYSTEMS, check_file_system, file_system_of, open_folder

SetMounts = Callable[..., None]


@pytest.fixture
def set_mounts(monkeypatch: pytest.MonkeyPatch) -> SetMounts:
    """Return a function that sets the mounts that the check sees, as pairs of mount point and type."""

    def set_(*mounts: tuple[Path, str]) -> None:
        partitions = [SimpleNamespace(mountpoint=str(point), fstype=kind) for point, kind in mounts]
        monkeypatch.setattr(store_folder.psutil, "disk_partitions", lambda all: partitions)

    return set_


def test_the_file_system_is_that_of_the_last_mount_on_the_deepest_mount_point(tmp_path: Path) -> None:
    (tmp_path / "data/runs").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "data/runs")
    mounts = [("/", "ext4"), (str(tmp_path / "data"), "xfs"), (str(tmp_path / "data"), "nfs4")]
    assert file_system_of(tmp_path, mounts) == "ext4"
    assert file_system_of(tmp_path / "link", mounts) == "nfs4"


@pytest.mark.parametrize(("name", "kind"), [(name, it) for name, kinds in NETWORK_FILE_SYSTEMS.items() for it in kinds])
def test_a_network_file_system_is_refused_by_name_with_the_way_out(
    tmp_path: Path, set_mounts: SetMounts, name: str, kind: str
) -> None:
    set_mounts((Path("/"), "ext4"), (tmp_path / "runs", kind))
    (tmp_path / "runs").mkdir()
    config = replay_config(tmp_path / "runs")
    with pytest.raises(UserError, match=f"is on {name}, a network file system") as error:
        open_folder(config)
    assert "set replay.folder to a folder on a local disk" in error.value.hint
    check_file_system(replay_config(tmp_path / "runs", folder=tmp_path / "local"))


def test_an_unknown_file_system_in_user_space_is_tried_out_and_warned_of(
    tmp_path: Path, set_mounts: SetMounts, caplog: pytest.LogCaptureFixture
) -> None:
    set_mounts((Path("/"), "fuse.unknown"))
    check_file_system(replay_config(tmp_path))
    assert "file system in user space (fuse.unknown)" in caplog.text
    assert not list(tmp_path.glob(".deskrl-probe-*"))


def _connect_without_shared_memory(path: Path, **options: Any) -> sqlite3.Connection:
    connection = sqlite3.Connection(path, **options)
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")  # other processes then see neither the log nor its locks
    return connection


def test_a_file_system_in_user_space_on_which_processes_do_not_share_locks_and_memory_is_refused(
    tmp_path: Path, set_mounts: SetMounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_mounts((Path("/"), "fuse.unknown"))
    monkeypatch.setattr(store_folder.sqlite3, "connect", _connect_without_shared_memory)
    with pytest.raises(UserError, match=r"\(fuse.unknown\) that is not suitable for SQLite"):
        check_file_system(replay_config(tmp_path))


def config_with_folder(tmp_path: Path) -> RunConfig:
    config = replay_config(tmp_path / "runs", folder=tmp_path / "local")
    RunDir(config.run_dir).create()
    return config


def test_the_store_is_in_the_run_directory_unless_a_folder_is_set(tmp_path: Path) -> None:
    config = replay_config(tmp_path / "runs")
    assert open_folder(config) == RunDir(config.run_dir).replay


def test_with_a_folder_the_run_directory_has_a_link_to_the_store_and_deleting_the_run_deletes_both(
    tmp_path: Path,
) -> None:
    config = config_with_folder(tmp_path)
    run_dir = RunDir(config.run_dir)
    folder = open_folder(config)
    assert folder.parent == tmp_path / "local"
    Store(folder, 10**9).close()
    assert (run_dir.replay / "replay.sqlite").is_file()
    assert open_folder(config) == folder, "the run is resumed"
    run_dir.create()
    run_dir.config.write_text("{}")
    delete_run(run_dir.root)
    assert not folder.exists() and not run_dir.root.exists()


def test_a_run_of_the_same_name_does_not_get_the_store_of_the_former_one(tmp_path: Path) -> None:
    config = config_with_folder(tmp_path)
    former = open_folder(config)
    config.run_dir.rename(config.run_dir.with_name("former"))
    RunDir(config.run_dir).create()
    assert open_folder(config) != former
    assert RunDir(config.run_dir.with_name("former")).replay.resolve() == former


def test_a_store_that_is_elsewhere_is_named_and_not_replaced_by_an_empty_one(tmp_path: Path) -> None:
    config = replay_config(tmp_path / "runs")
    Store(open_folder(config), 10**9).close()
    moved = replay_config(tmp_path / "runs", folder=tmp_path / "local")
    with pytest.raises(UserError, match=r"the store of this run is in .*/run/replay \(hint: move its files"):
        open_folder(moved)


@pytest.mark.parametrize("has_folder", [True, False])
def test_a_store_on_the_disk_of_another_machine_is_named_and_not_replaced_by_an_empty_one(
    tmp_path: Path, has_folder: bool
) -> None:
    config = config_with_folder(tmp_path)
    open_folder(config).rename(tmp_path / "the disk of another machine")
    RunDir(config.run_dir).create()  # as another role on this machine does
    with pytest.raises(UserError, match="does not exist on this machine"):
        open_folder(config if has_folder else replay_config(tmp_path / "runs"))
