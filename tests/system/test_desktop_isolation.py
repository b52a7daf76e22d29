"""Nothing that is done inside a desktop reaches the machine, and the worst of it costs one reset."""

import asyncio
import os
import socket
from pathlib import Path

import pytest
from desktop_kit import running_desktop

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.desktops.base import DesktopError, DesktopGone
from deskrl.actor.desktops.embedded import EmbeddedDesktop
from deskrl.actor.desktops.orphans import Record
from deskrl.actor.desktops.packages import missing_packages
from deskrl.core.config import DesktopConfig

pytestmark = pytest.mark.skipif(bool(missing_packages()), reason=f"packages missing: {missing_packages()}")

CONFIG = DesktopConfig(width=640, height=480, memory_bytes=512 * 1024**2, max_processes=128)
REMOTE_S = 5.0


async def attempt(desktop: EmbeddedDesktop, command: str) -> None:
    """Run what may take the desktop down, and give it some seconds to do its worst."""
    try:
        async with asyncio.timeout(REMOTE_S):
            await desktop.execute(command, shell=True)
    except (DesktopError, TimeoutError):
        pass


async def works(desktop: EmbeddedDesktop) -> bool:
    """Whether input reaches an application."""
    await desktop.launch("xterm")
    await desktop.wait_for_window("xterm")
    await desktop.settle()
    await desktop.act(Action(ActionKind.TYPE, text="echo here > ~/typed.txt; exit\n"))
    while await desktop.windows():
        await desktop.settle()
    return await desktop.read_file("~/typed.txt") == b"here\n"


def test_removing_every_file_harms_nothing_outside_and_costs_one_reset(run_root: Path) -> None:
    beside = run_root.parent / "beside.txt"
    beside.write_text("kept")
    programs = len(os.listdir("/usr/bin"))

    async def scenario() -> None:
        async with running_desktop(CONFIG, run_root) as desktop:
            await attempt(desktop, "rm -rf --no-preserve-root / /home/user/*")
            await desktop.reset()
            assert await works(desktop)

    asyncio.run(scenario())
    assert beside.read_text() == "kept"
    assert len(os.listdir("/usr/bin")) == programs


def test_a_fork_bomb_meets_its_limit_and_costs_one_reset(run_root: Path) -> None:
    async def scenario() -> None:
        async with running_desktop(CONFIG, run_root) as desktop, running_desktop(CONFIG, run_root / "other") as other:
            await attempt(desktop, "bomb() { bomb | bomb & }; bomb; sleep 1000")
            for group in Record.read(run_root / "desktop").groups:
                for counter in group.glob("pids.current"):
                    assert int(counter.read_text()) <= CONFIG.max_processes
            assert await works(other)
            await desktop.reset()
            assert await works(desktop)

    asyncio.run(scenario())


def test_memory_is_limited(run_root: Path) -> None:
    hog = f"x = b'x' * {CONFIG.memory_bytes}; print('got it')"

    async def scenario() -> None:
        async with running_desktop(CONFIG, run_root) as desktop:
            done = await desktop.execute(["/usr/bin/python3", "-c", hog])
            assert done.returncode != 0
            assert "got it" not in done.stdout

    asyncio.run(scenario())


def test_a_full_home_folder_fills_no_disk(run_root: Path) -> None:
    async def scenario() -> None:
        async with running_desktop(CONFIG, run_root) as desktop:
            kinds = await desktop.execute("stat --file-system --format %T ~ /tmp /run /dev/shm", shell=True)
            assert set(kinds.stdout.split()) == {"tmpfs"}
            writable = await desktop.execute("find / -xdev -path /proc -prune -o -writable -type f -print", shell=True)
            assert writable.stdout == ""

    asyncio.run(scenario())


def test_the_network_is_its_own(run_root: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0deskrl-test-{os.getpid()}")
        abstract.listen()
        try_both = (
            "import socket, sys\n"
            f"tcp, abstract = {tcp.getsockname()!r}, {abstract.getsockname()!r}\n"
            "for kind, at in ((socket.AF_INET, tcp), (socket.AF_UNIX, abstract)):\n"
            "    try: socket.socket(kind).connect(at)\n"
            "    except ConnectionRefusedError: print('refused')\n"
        )

        async def scenario() -> None:
            async with running_desktop(CONFIG, run_root) as desktop:
                done = await desktop.execute(["/usr/bin/python3", "-c", try_both])
                assert done.stdout.split() == ["refused", "refused"], done.stderr
                interfaces = (await desktop.read_file("/proc/net/dev")).decode().splitlines()[2:]
                assert [line.split(":")[0].strip() for line in interfaces] == ["lo"]

        asyncio.run(scenario())


def test_it_has_a_user_of_its_own_without_a_way_to_more_rights(run_root: Path) -> None:
    async def scenario() -> None:
        async with running_desktop(CONFIG, run_root) as desktop:
            assert (await desktop.execute("id -un; id -u", shell=True)).stdout.split() == ["user", "1000"]
            status = (await desktop.read_file("/proc/self/status")).decode()
            assert "NoNewPrivs:\t1" in status
            assert "CapEff:\t0000000000000000" in status
            assert (await desktop.execute(["unshare", "--user", "true"])).returncode != 0
            assert (await desktop.execute("ls /root /home", shell=True)).stdout.count("user") == 1

    asyncio.run(scenario())


def test_desktops_do_not_see_one_another(run_root: Path) -> None:
    async def scenario() -> None:
        async with running_desktop(CONFIG, run_root) as desktop, running_desktop(CONFIG, run_root / "other") as other:
            await other.launch(["sleep", "12345"])
            await other.write_file("/tmp/mine", b"")
            assert "12345" not in (await desktop.execute(["ps", "ax"])).stdout
            assert (await desktop.execute(["ls", "/tmp/mine"])).returncode != 0
            await desktop.launch("xterm")
            await desktop.wait_for_window("xterm")
            assert await other.windows() == []

    asyncio.run(scenario())


def test_a_desktop_whose_server_was_killed_is_gone_and_says_so(run_root: Path) -> None:
    async def scenario() -> None:
        async with running_desktop(CONFIG, run_root) as desktop:
            with pytest.raises(DesktopGone):
                await desktop.execute("kill -9 -1; sleep 1000", shell=True)
            assert not await desktop.is_alive()
            with pytest.raises(DesktopGone):
                await desktop.screenshot()
            await desktop.reset()
            assert await desktop.is_alive()

    asyncio.run(scenario())
