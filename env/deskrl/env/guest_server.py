"""Guest server: one desktop whose guest server is reachable on a TCP port of the loopback, for desktop-env.

    python -m deskrl.env.guest_server [RUN.toml] [--size WIDTHxHEIGHT]

Prints `{"port": 40123}` when the desktop has started. After each line on standard input, it resets the desktop and
prints the same. It removes the desktop and ends when its standard input is closed. An error is `{"error": "..."}`, the
last line.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from deskrl.actor.desktop_starts import reset_in_time
from deskrl.actor.desktops.base import Desktop, DesktopError
from deskrl.actor.desktops.provider_registry import check_usable, make_desktop, reap_desktops
from deskrl.actor.main import desktops_dir
from deskrl.core.config import DesktopConfig
from deskrl.core.error_text import one_line
from deskrl.core.errors import UserError
from deskrl.core.ids import new_id
from deskrl.env.desktop_env import env_config

_CHUNK_BYTES = 65536


async def serve(config: DesktopConfig, run_root: Path) -> None:
    """Run one desktop until standard input is closed.

    Args:
        config: section `desktop` of a run configuration.
        run_root: folder of the desktops of the run.

    Raises:
        UserError: a requirement of the provider is not met on this machine.
        DesktopError: the desktop did not start.
    """
    await asyncio.to_thread(reap_desktops, config, run_root)
    desktop = make_desktop(config, new_id("desktop"), run_root)
    try:
        async with await asyncio.start_server(_forwarder(desktop), "127.0.0.1", 0) as server:
            reply = json.dumps({"port": server.sockets[0].getsockname()[1]})
            while True:
                await reset_in_time(desktop, config.start_timeout_s)
                print(reply, flush=True)
                if not await asyncio.to_thread(sys.stdin.readline):
                    return
    finally:
        await desktop.close()


def _forwarder(desktop: Desktop) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    """Return the handler of connections, which forwards each to the guest server of the desktop."""

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):  # one side has closed the connection
            while data := await reader.read(_CHUNK_BYTES):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            address = desktop.address
            if isinstance(address, Path):
                guest_reader, guest_writer = await asyncio.open_unix_connection(address)
            else:
                guest_reader, guest_writer = await asyncio.open_connection(*address)
        except (DesktopError, OSError):  # the client sees a closed connection
            writer.close()
            return
        await asyncio.gather(copy(reader, guest_writer), copy(guest_reader, writer))

    return forward


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve one desktop; return 2 after an error of the configuration, and 1 after one of the desktop."""
    parser = argparse.ArgumentParser(description="One desktop for desktop-env.")
    parser.add_argument("config", nargs="?", type=Path, help="run configuration; default: embedded desktops")
    parser.add_argument("--size", default="", help="screen size, such as 1920x1080; default: that of the configuration")
    options = parser.parse_args(arguments)
    try:
        config = env_config(options.config)
        desktop = _sized(config.desktop, options.size) if options.size else config.desktop
        check_usable(desktop)
        asyncio.run(serve(desktop, desktops_dir(config)))
    except (UserError, DesktopError, OSError) as error:
        print(json.dumps({"error": one_line(error)}), flush=True)
        return 2 if isinstance(error, UserError) else 1
    return 0


def _sized(config: DesktopConfig, size: str) -> DesktopConfig:
    """Return the configuration with another screen size; raises UserError."""
    width, _, height = size.partition("x")
    try:
        return DesktopConfig.model_validate(config.model_dump() | {"width": int(width), "height": int(height)})
    except ValueError as error:
        raise UserError(
            f"--size {size}: not a screen size", "give WIDTHxHEIGHT in pixels, such as 1920x1080"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
