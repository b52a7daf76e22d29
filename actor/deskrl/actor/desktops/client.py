"""The host's end of a guest server: HTTP over a socket, a connection a request. Knows no route's meaning."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deskrl.actor.desktops.base import Address, DesktopError, DesktopGone

_BUFFER_BYTES = 4 * 1024**2


@dataclass(frozen=True)
class Reply:
    """What the guest answered; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The guest's own words for what went wrong."""
        try:
            value = self.json()
        except ValueError:
            return self.body.decode("utf-8", "replace")
        return str(value.get("error") or value.get("message")) if isinstance(value, dict) else str(value)


async def request(
    address: Address,
    method: str,
    target: str,
    body: bytes | dict[str, Any] = b"",
    content_type: str = "application/json",
) -> Reply:
    """Send one request to the server at `address`.

    Raises:
        DesktopGone: nobody listens there, or the answer broke off.
        DesktopError: the answer is not HTTP.
    """
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    fields = {"Host": "desktop", "Connection": "close", "Content-Type": content_type, "Content-Length": len(data)}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    try:
        if isinstance(address, Path):
            reader, writer = await asyncio.open_unix_connection(address, limit=_BUFFER_BYTES)
        else:
            reader, writer = await asyncio.open_connection(*address, limit=_BUFFER_BYTES)
    except OSError as error:
        raise DesktopGone(f"the guest server is gone: {error}") from error
    try:
        writer.write(f"{method} {target} HTTP/1.1\r\n{head}\r\n".encode() + data)
        await writer.drain()
        answer = await reader.readuntil(b"\r\n\r\n")
        status_line, *lines = answer.decode("latin-1").split("\r\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return Reply(int(status_line.split()[1]), headers, await reader.readexactly(int(headers["content-length"])))
    except (OSError, asyncio.IncompleteReadError) as error:
        raise DesktopGone("the guest server broke off") from error
    except (ValueError, IndexError, KeyError, asyncio.LimitOverrunError) as error:
        raise DesktopError("the guest server answered nonsense") from error
    finally:
        writer.close()


def checked(reply: Reply) -> Reply:
    """The reply; raises DesktopError with the guest's words if it is a refusal."""
    if reply.status != 200:
        raise DesktopError(f"the guest refused ({reply.status}): {reply.error}")
    return reply
