"""The provider `remote` drives any guest that speaks OSWorld's protocol, over TCP: here deskrl's own, by that protocol.

With `DESKRL_OSWORLD_GUEST=host:port` the same contract is held to another guest, such as OSWorld's own server.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from desktop_kit import running_desktop
from ports_kit import free_port

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.desktops.base import DesktopError
from deskrl.actor.desktops.packages import missing_packages
from deskrl.actor.desktops.provider import make_desktop, refuse_unusable
from deskrl.actor.desktops.remote import RemoteDesktop
from deskrl.core.config import DesktopConfig, RemoteConfig
from deskrl.core.errors import UserError

OTHER_GUEST = os.environ.get("DESKRL_OSWORLD_GUEST", "")

pytestmark = pytest.mark.skipif(
    bool(missing_packages()) and not OTHER_GUEST, reason=f"packages missing: {missing_packages()}"
)

TEXT = "a 'b' \"c\" <d> é 漢\nsecond"


def remote(*addresses: str, reset_command: str = "", start_timeout_s: float = 30.0) -> DesktopConfig:
    return DesktopConfig(
        provider="remote",
        num_envs=1,
        start_timeout_s=start_timeout_s,
        remote=RemoteConfig(addresses=addresses, reset_command=reset_command),
    )


@asynccontextmanager
async def guest(run_root: Path) -> AsyncIterator[str]:
    """The address of a guest server."""
    if OTHER_GUEST:
        yield OTHER_GUEST
        return
    async with running_desktop(DesktopConfig(width=800, height=600), run_root) as desktop:

        async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            inside = await asyncio.open_unix_connection(desktop.socket_path)
            await asyncio.gather(copy(reader, inside[1]), copy(inside[0], writer))

        async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
            writer.close()

        async with await asyncio.start_server(forward, "127.0.0.1", 0) as server:
            yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.fixture
def on_remote(run_root: Path) -> Callable[[Callable[[RemoteDesktop], Awaitable[None]]], None]:
    """`on_remote(play)` runs `play` on a remote desktop that is reset."""

    def on_remote(play: Callable[[RemoteDesktop], Awaitable[None]]) -> None:
        async def run() -> None:
            async with guest(run_root) as address:
                desktop = make_desktop(remote(address), "d", run_root / "remote")
                assert isinstance(desktop, RemoteDesktop)
                try:
                    await desktop.reset()
                    await play(desktop)
                finally:
                    await desktop.close()

        asyncio.run(run())

    return on_remote


def test_text_arrives_in_an_application_as_it_is_typed(on_remote: Callable[..., None]) -> None:
    async def play(desktop: RemoteDesktop) -> None:
        await desktop.write_file("~/read.sh", b"cat > ~/typed\n")
        await desktop.launch(["xterm", "-u8", "-title", "reader", "-e", "sh", "/home/user/read.sh"])
        await desktop.wait_for_window("reader")
        await desktop.activate_window("reader")
        await desktop.settle()
        await desktop.act(Action(ActionKind.TYPE, text=TEXT + "\n"))
        for _ in range(50):
            await desktop.settle()
            if (await desktop.read_file("~/typed")).decode() == TEXT + "\n":
                break
        assert (await desktop.read_file("~/typed")).decode() == TEXT + "\n"

    on_remote(play)


def test_commands_and_files_mean_what_they_mean_on_other_desktops(on_remote: Callable[..., None]) -> None:
    async def play(desktop: RemoteDesktop) -> None:
        assert await desktop.is_alive()
        done = await desktop.execute("echo out; echo err >&2; exit 3", shell=True)
        assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
        assert (await desktop.execute(["no-such-program-here"])).returncode == 127
        await desktop.write_file("~/folder/file", bytes(range(256)))
        assert await desktop.read_file("~/folder/file") == bytes(range(256))
        with pytest.raises(FileNotFoundError):
            await desktop.read_file("~/folder/other")
        await desktop.close_window("no such window")
        with pytest.raises(DesktopError, match="not over after"):
            await desktop.execute("sleep 5", shell=True, timeout_s=0.2)

    on_remote(play)


@pytest.mark.skipif(bool(OTHER_GUEST), reason="needs no guest")
def test_a_reset_is_the_users_command(run_root: Path) -> None:
    async def run() -> None:
        async with guest(run_root) as address:
            port = address.rpartition(":")[2]
            command = f'test "{{host}}:{{port}}" = 127.0.0.1:{port} && touch {run_root}/was-reset'
            desktop = make_desktop(remote(address, reset_command=command), "d", run_root / "remote")
            await desktop.reset()
            assert (run_root / "was-reset").exists()
            await desktop.close()
            failing = make_desktop(remote(address, reset_command="echo no snapshot; exit 4"), "d", run_root / "remote")
            with pytest.raises(DesktopError, match="reset_command ended with status 4: no snapshot"):
                await failing.reset()
            await failing.close()

    asyncio.run(run())


def test_an_address_serves_one_desktop_at_a_time(run_root: Path) -> None:
    async def run() -> None:
        async with guest(run_root) as address:
            first = make_desktop(remote(address), "a", run_root / "remote")
            second = make_desktop(remote(address, start_timeout_s=0.3), "b", run_root / "remote")
            await first.start()
            with pytest.raises(DesktopError, match="none of 1 remote guests is free"):
                await second.start()
            await first.close()
            await second.start()
            await second.close()

    asyncio.run(run())


def test_a_guest_that_never_answers_is_named(run_root: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    desktop = make_desktop(remote(address, start_timeout_s=0.5), "d", run_root)
    with pytest.raises(DesktopError, match=f"the guest at {address} does not answer: the guest server is gone"):
        asyncio.run(desktop.start())


def test_fewer_addresses_than_desktops_are_refused() -> None:
    config = remote("127.0.0.1:5000", "127.0.0.1:5000").model_copy(update={"num_envs": 2})
    with pytest.raises(UserError, match=r"num_envs = 2 and desktop\.remote\.addresses names 1 guests; "):
        refuse_unusable(config)
