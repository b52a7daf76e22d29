"""Whatever ends a desktop or its owner, nothing of it stays."""

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from deskrl.actor.desktops.embedded import EmbeddedDesktop
from deskrl.actor.desktops.orphans import Record, processes_of, reap_orphans
from deskrl.actor.desktops.packages import missing_packages
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
    """Wait for processes that are ending; fails if one does not."""
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        with open(descriptor, "rb"):
            assert select.select([descriptor], [], [], DEADLINE_S)[0], f"process {pid} still runs"


def all_processes(folder: Path) -> list[int]:
    """Every process of a desktop as the host counts them, applications too: those in its first process's namespace."""
    namespaces = {os.readlink(f"/proc/{pid}/ns/pid") for pid in processes_of(folder)} - {
        os.readlink("/proc/self/ns/pid")
    }
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.readlink(f"/proc/{entry}/ns/pid") in namespaces:
                found.append(int(entry))
        except OSError:
            continue
    return sorted({*found, *processes_of(folder)})


def test_close_leaves_neither_process_nor_group_nor_folder(run_root: Path) -> None:
    async def scenario() -> tuple[list[int], tuple[Path, ...]]:
        desktop = EmbeddedDesktop(CONFIG, "desktop", run_root)
        await desktop.start()
        await desktop.launch("mousepad")
        await desktop.wait_for_window("mousepad")
        seen = all_processes(run_root / "desktop"), Record.read(run_root / "desktop").groups
        await desktop.close()
        await desktop.close()
        return seen

    mounts = Path("/proc/self/mounts").read_text()
    pids, groups = asyncio.run(scenario())
    assert len(pids) >= 6  # bubblewrap twice, server, X server, message bus, window manager, application
    assert not [pid for pid in pids if Path("/proc", str(pid)).exists()]
    assert not [group for group in groups if group.exists()]
    assert not run_root.exists()
    assert Path("/proc/self/mounts").read_text() == mounts


def num_held(desktop: Path) -> tuple[int, int]:
    """Processes of a desktop, and files that this process has open."""
    return len(all_processes(desktop)), len(os.listdir("/proc/self/fd"))


def test_many_resets_leave_no_process_behind(run_root: Path) -> None:
    async def scenario() -> None:
        desktop = EmbeddedDesktop(CONFIG, "desktop", run_root)
        try:
            await desktop.start()
            before = num_held(run_root / "desktop")
            for _ in range(10):
                await desktop.reset()
            assert num_held(run_root / "desktop") == before
        finally:
            await desktop.close()

    asyncio.run(scenario())


def test_a_stopped_desktop_meets_its_callers_deadline_and_closes(run_root: Path) -> None:
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


def test_a_start_that_is_cancelled_leaves_nothing(run_root: Path) -> None:
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


def test_desktops_die_with_a_killed_owner_and_the_rest_is_reaped(run_root: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(run_root)], stdout=subprocess.PIPE)
    try:
        assert owner.stdout is not None and owner.stdout.readline() == b"up\n"
        pids, groups = all_processes(run_root / "desktop"), Record.read(run_root / "desktop").groups
        assert len(pids) >= 6
        assert reap_orphans(run_root) == 0  # its owner lives
    finally:
        owner.kill()
        owner.wait()
        owner.communicate()
    wait_until_ended(pids)
    assert reap_orphans(run_root) == 1
    assert not run_root.exists()
    assert not [group for group in groups if group.exists()]


def test_a_desktop_that_outlived_its_owner_is_reaped(run_root: Path) -> None:
    folder = run_root / "desktop"

    async def scenario() -> None:
        desktop = EmbeddedDesktop(CONFIG, "desktop", run_root)
        await desktop.start()
        pids = all_processes(folder)
        record = json.loads((folder / "desktop.json").read_text())
        (folder / "desktop.json").write_text(json.dumps(record | {"start_ticks": 1}))  # as after a reuse of the id
        assert await asyncio.to_thread(reap_orphans, run_root) == 1
        wait_until_ended(pids)
        await desktop.close()

    asyncio.run(scenario())
    assert not run_root.exists()


def test_nothing_to_reap_where_nothing_was(run_root: Path) -> None:
    assert reap_orphans(run_root) == 0
