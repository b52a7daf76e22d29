"""Processes, control groups and folders of a desktop are removed however it or its owner ends."""

import asyncio
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from deskrl.actor.desktops.debian_packages import missing_packages
from deskrl.actor.desktops.embedded import EmbeddedDesktop
from deskrl.actor.desktops.orphan_cleanup import OwnerRecord, find_sandbox_processes, reap_orphans
from deskrl.core.config import DesktopConfig

pytestmark = pytest.mark.skipif(bool(missing_packages()), reason=f"packages missing: {missing_packages()}")

CONFIG = DesktopConfig(width=640, height=480)
DEADLINE_S = 60.0
OWNER = """
import asyncio, sys
from pathlib import Path
from deskrl.actor.desktops.embedded import EmbeddedDesktop
from deskrl.core.config import DesktopConfig

async def main():
    desktop = EmbeddedDesktop(DesktopConfig(width=640, height=480), "desktop", Path(sys.argv[1]))
    await desktop.start()
    await desktop.launch("mousepad")
    await desktop.wait_for_window("mousepad")
    print("up", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
def run_root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="deskrl-test-") as folder:
        yield Path(folder) / "desktops"


def wait_until_ended(pids: list[int]) -> None:
    """Wait until processes have ended; fails if one still runs after DEADLINE_S."""
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        with open(descriptor, "rb"):
            assert select.select([descriptor], [], [], DEADLINE_S)[0], f"process {pid} still runs"


def all_processes(folder: Path) -> list[int]:
    """Return the host's ids of all processes of a desktop, including those in the sandboxes inside its sandbox."""
    found = set(find_sandbox_processes(folder))
    for pid in list(found):
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= {child.pid for child in psutil.Process(pid).children(recursive=True)}
    return sorted(found)


def test_close_removes_processes_control_groups_mounts_and_the_folder(run_root: Path) -> None:
    async def scenario() -> tuple[list[int], tuple[Path, ...]]:
        desktop = EmbeddedDesktop(CONFIG, "desktop", run_root)
        await desktop.start()
        await desktop.launch("mousepad")
        await desktop.wait_for_window("mousepad")
        seen = all_processes(run_root / "desktop"), OwnerRecord.read(run_root / "desktop").groups
        await desktop.close()
        await desktop.close()
        return seen

    mounts = Path("/proc/self/mounts").read_text()
    pids, groups = asyncio.run(scenario())
    assert len(pids) >= 11  # bubblewrap 4 times, server, spawner, X server, init, bus, window manager, application
    assert not [pid for pid in pids if Path("/proc", str(pid)).exists()]
    assert not [group for group in groups if group.exists()]
    assert not run_root.exists()
    assert Path("/proc/self/mounts").read_text() == mounts


def num_processes_and_files(desktop: Path) -> tuple[int, int]:
    """Return the number of a desktop's processes and of this process's open files."""
    return len(all_processes(desktop)), len(os.listdir("/proc/self/fd"))


def test_many_resets_leak_neither_processes_nor_open_files(run_root: Path) -> None:
    async def scenario() -> None:
        desktop = EmbeddedDesktop(CONFIG, "desktop", run_root)
        try:
            await desktop.start()
            before = num_processes_and_files(run_root / "desktop")
            for _ in range(10):
                await desktop.reset()
            assert num_processes_and_files(run_root / "desktop") == before
        finally:
            await desktop.close()

    asyncio.run(scenario())


def test_a_stopped_desktop_can_be_cancelled_by_a_deadline_and_closed(run_root: Path) -> None:
    async def scenario() -> list[int]:
        desktop = EmbeddedDesktop(CONFIG, "desktop", run_root)
        await desktop.start()
        pids = all_processes(run_root / "desktop")
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await desktop.settle()
        await desktop.close()
        return pids

    pids = asyncio.run(scenario())
    assert not [pid for pid in pids if Path("/proc", str(pid)).exists()]


def test_a_cancelled_start_leaves_no_processes_and_no_folder(run_root: Path) -> None:
    async def scenario() -> list[int]:
        desktop = EmbeddedDesktop(CONFIG, "desktop", run_root)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await desktop.start()
        pids = all_processes(run_root / "desktop")
        await desktop.close()
        return pids

    wait_until_ended(asyncio.run(scenario()))
    assert not run_root.exists()


def test_processes_end_with_a_killed_owner_and_its_folder_and_groups_are_reaped(run_root: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(run_root)], stdout=subprocess.PIPE)
    try:
        assert owner.stdout is not None and owner.stdout.readline() == b"up\n"
        pids, groups = all_processes(run_root / "desktop"), OwnerRecord.read(run_root / "desktop").groups
        assert len(pids) >= 6
        assert reap_orphans(run_root) == 0  # its owner is alive
    finally:
        owner.kill()
        owner.wait()
        owner.communicate()
    wait_until_ended(pids)
    assert reap_orphans(run_root) == 1
    assert not run_root.exists()
    assert not [group for group in groups if group.exists()]


def test_a_running_desktop_whose_owner_has_ended_is_reaped(run_root: Path) -> None:
    folder = run_root / "desktop"

    async def scenario() -> None:
        desktop = EmbeddedDesktop(CONFIG, "desktop", run_root)
        await desktop.start()
        pids = all_processes(folder)
        record = json.loads((folder / "desktop.json").read_text())
        (folder / "desktop.json").write_text(json.dumps(record | {"start_ticks": 1}))  # simulates a reused process id
        assert await asyncio.to_thread(reap_orphans, run_root) == 1
        wait_until_ended(pids)
        await desktop.close()

    asyncio.run(scenario())
    assert not run_root.exists()


def test_reaping_a_missing_run_root_does_nothing(run_root: Path) -> None:
    assert reap_orphans(run_root) == 0
