"""The provider `remote` controls any guest that implements OSWorld's protocol over TCP, here deskrl's own guest server.

`DESKRL_OSWORLD_GUEST=host:port` runs the same contract against another guest, such as OSWorld's own server.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from desktop_kit import running_desktop
from ports_kit import free_port
from remote_guest_kit import forwarding_guest

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.desktops.base import DesktopError
from deskrl.actor.desktops.debian_packages import missing_packages
from deskrl.actor.desktops.embedded import EmbeddedDesktop
from deskrl.actor.desktops.provider_registry import check_usable, make_desktop
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
    """Provide the address of a guest server."""
    if OTHER_GUEST:
        yield OTHER_GUEST
        return
    async with running_desktop(DesktopConfig(width=800, height=600), run_root) as desktop:
        assert isinstance(desktop, EmbeddedDesktop)
        async with forwarding_guest(desktop) as address:
            yield address


@pytest.fixture
def on_remote(run_root: Path) -> Callable[[Callable[[RemoteDesktop], Awaitable[None]]], None]:
    """Provide a function that runs a scenario on a remote desktop after a reset."""

    def on_remote(scenario: Callable[[RemoteDesktop], Awaitable[None]]) -> None:
        async def run() -> None:
            async with guest(run_root) as address:
                desktop = make_desktop(remote(address), "d", run_root / "remote")
                assert isinstance(desktop, RemoteDesktop)
                try:
                    await desktop.reset()
                    await scenario(desktop)
                finally:
                    await desktop.close()

        asyncio.run(run())

    return on_remote


def test_an_application_receives_typed_text_unchanged(on_remote: Callable[..., None]) -> None:
    async def scenario(desktop: RemoteDesktop) -> None:
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

    on_remote(scenario)


def test_commands_and_files_behave_as_on_other_desktops(on_remote: Callable[..., None]) -> None:
    async def scenario(desktop: RemoteDesktop) -> None:
        assert await desktop.is_alive()
        done = await desktop.execute("echo out; echo err >&2; exit 3", shell=True)
        assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
        assert (await desktop.execute(["no-such-program-here"])).returncode == 127
        await desktop.write_file("~/folder/file", bytes(range(256)))
        assert await desktop.read_file("~/folder/file") == bytes(range(256))
        with pytest.raises(FileNotFoundError):
            await desktop.read_file("~/folder/other")
        await desktop.close_window("no such window")
        with pytest.raises(DesktopError, match="did not finish within"):
            await desktop.execute("sleep 5", shell=True, timeout_s=0.2)

    on_remote(scenario)


@pytest.mark.skipif(bool(OTHER_GUEST), reason="tests only the host side")
def test_a_reset_runs_the_configured_command(run_root: Path) -> None:
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


def test_a_guest_that_never_responds_is_named_in_the_error(run_root: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    desktop = make_desktop(remote(address, start_timeout_s=0.5), "d", run_root)
    with pytest.raises(DesktopError, match=f"the guest at {address} does not respond: cannot connect"):
        asyncio.run(desktop.start())


def test_fewer_addresses_than_desktops_are_rejected() -> None:
    config = remote("127.0.0.1:5000", "127.0.0.1:5000").model_copy(update={"num_envs": 2})
    with pytest.raises(UserError, match=r"num_envs = 2, but desktop\.remote\.addresses lists 1 guests \(hint: "):
        check_usable(config)
