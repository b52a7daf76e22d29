"""Guests of the provider `remote`: embedded desktops whose guest servers are reachable over TCP."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from desktop_kit import DEADLINE_S, running_desktop

from deskrl.actor.desktops.embedded import EmbeddedDesktop
from deskrl.core.config import DesktopConfig


@asynccontextmanager
async def forwarding_guest(desktop: EmbeddedDesktop, port: int = 0) -> AsyncIterator[str]:
    """Forward a TCP port of the loopback to the guest server of an embedded desktop, and yield the address.

    Args:
        desktop: running desktop.
        port: port number; 0 chooses a free one.
    """

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inside = await asyncio.open_unix_connection(desktop.socket_path)
        await asyncio.gather(copy(reader, inside[1]), copy(inside[0], writer))

    async with await asyncio.start_server(forward, "127.0.0.1", port) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


class ServedGuest:
    """Embedded desktop whose guest server is reachable over TCP, in an event loop of its own."""

    def __init__(self, loop: asyncio.AbstractEventLoop, desktop: EmbeddedDesktop, end: asyncio.Event) -> None:
        self._loop = loop
        self._desktop = desktop
        self._end = end

    def listen(self, port: int) -> None:
        """Forward a port to the guest server until the block of `serving_guest` ends."""
        opened = threading.Event()

        async def serve() -> None:
            async with forwarding_guest(self._desktop, port):
                opened.set()
                await self._end.wait()

        future = asyncio.run_coroutine_threadsafe(serve(), self._loop)
        if not opened.wait(DEADLINE_S):
            raise RuntimeError(f"port {port} is not forwarded: {future}")


@contextmanager
def serving_guest() -> Iterator[ServedGuest]:
    """Run an embedded desktop in a thread while the block is executed."""
    loop = asyncio.new_event_loop()
    end = asyncio.Event()
    served: list[ServedGuest] = []
    ready = threading.Event()

    async def run(folder: Path) -> None:
        async with running_desktop(DesktopConfig(), folder / "desktops") as desktop:
            assert isinstance(desktop, EmbeddedDesktop)
            served.append(ServedGuest(loop, desktop, end))
            ready.set()
            await end.wait()
            await asyncio.sleep(0)

    def work() -> None:
        with tempfile.TemporaryDirectory(prefix="deskrl-guest-") as folder:
            try:
                loop.run_until_complete(run(Path(folder)))
            finally:
                ready.set()

    thread = threading.Thread(target=work)
    thread.start()
    ready.wait(DEADLINE_S)
    try:
        yield served[0]
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join(DEADLINE_S)
