"""HTTP client of guest servers over Unix sockets and TCP, in which every response is bounded in size and time.

A guest may be controlled by the policy, so a response is rejected if it is not what the operation expects: one
connection and one response of announced length per request, no redirects, no decompression, no cookies, no proxies.
"""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from deskrl.actor.desktops.base import Address, DesktopError, DesktopGone
from deskrl.core.error_text import one_line

if TYPE_CHECKING:
    import aiohttp

STATUS_BYTES = 64 * 1024
"""Size limit in bytes of a response that carries only a status, and of an error's body that is read."""
_BUFFER_BYTES = 256 * 1024
_MESSAGE_CHARACTERS = 1000

_T = TypeVar("_T")


class ResponseTooLarge(DesktopError):
    """The response is longer than the operation allows."""


class _ErrorReply(msgspec.Struct):
    error: str = ""
    message: str = ""


@dataclass(frozen=True)
class GuestResponse:
    """Response of a guest server; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def decode(self, reply_type: type[_T]) -> _T:
        """Return the body parsed as JSON into a type of msgspec; raises DesktopError if it does not match the type.

        msgspec checks types while it parses, so that a hostile reply needs no more memory than the fields of the type.
        """
        try:
            return msgspec.json.decode(self.body, type=reply_type)
        except (ValueError, RecursionError) as error:
            reason = one_line(error, 200)
            raise DesktopError(f"the guest server sent a reply without the expected fields: {reason}") from error

    @property
    def error(self) -> str:
        """Error message of the guest server, at most 1000 characters."""
        try:
            reply = msgspec.json.decode(self.body, type=_ErrorReply)
        except (ValueError, RecursionError):
            return one_line(self.body.decode("utf-8", "replace") or "no message", _MESSAGE_CHARACTERS)
        return one_line(reply.error or reply.message or "no message", _MESSAGE_CHARACTERS)


async def send_request(
    address: Address,
    method: str,
    target: str,
    body: bytes | Mapping[str, Any] = b"",
    content_type: str = "application/json",
    *,
    max_bytes: int = STATUS_BYTES,
    timeout_s: float,
) -> GuestResponse:
    """Send one request to the guest server at `address` and return the response.

    Args:
        address: address of the guest server.
        method: HTTP method.
        target: path and query.
        body: content of the request; a mapping is sent as JSON.
        content_type: media type of the content.
        max_bytes: size limit of the response's body. The body of an error status is cut to `STATUS_BYTES`.
        timeout_s: limit in seconds for the whole exchange.

    Raises:
        DesktopGone: the connection was rejected or was closed before the response was complete.
        ResponseTooLarge: the announced length is above `max_bytes`.
        DesktopError: the response is not valid HTTP, has no length, or was not complete within `timeout_s`.
    """
    import aiohttp  # imported on first use: commands that only check a configuration do not need it

    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    content = data if len(data) <= _BUFFER_BYTES else io.BytesIO(data)  # which aiohttp sends in pieces
    headers = {"Content-Type": content_type, "Accept-Encoding": "identity"}
    try:
        async with (
            asyncio.timeout(timeout_s),
            _session(address) as session,
            session.request(
                method, _url(address, target), data=content, headers=headers, allow_redirects=False
            ) as response,
        ):
            received = await _read_body(response, max_bytes)
            fields = {name.lower(): value for name, value in response.headers.items()}
            return GuestResponse(response.status, fields, received)
    except TimeoutError as error:
        raise DesktopError(f"the guest server did not respond within {timeout_s:g} s") from error
    except aiohttp.ClientConnectorError as error:
        raise DesktopGone(f"cannot connect to the guest server: {one_line(error, 200)}") from error
    except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError) as error:
        raise DesktopGone("the guest server closed the connection") from error
    except (aiohttp.ClientError, ValueError) as error:
        raise DesktopError(f"the guest server sent an invalid HTTP response: {one_line(error, 200)}") from error


def check_response(response: GuestResponse) -> GuestResponse:
    """Return the response; raises DesktopError with the guest's error message if its status is not 200."""
    if response.status != 200:
        raise DesktopError(f"the guest server reports status {response.status}: {response.error}")
    return response


def _session(address: Address) -> aiohttp.ClientSession:
    import aiohttp

    connector: aiohttp.BaseConnector = (
        aiohttp.UnixConnector(str(address), force_close=True)
        if isinstance(address, Path)
        else aiohttp.TCPConnector(force_close=True)
    )
    return aiohttp.ClientSession(
        connector=connector,
        response_class=_response_class(),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        trust_env=False,
        timeout=aiohttp.ClientTimeout(),  # `send_request` limits the whole exchange
        read_bufsize=_BUFFER_BYTES,
    )


@cache
def _response_class() -> type[aiohttp.ClientResponse]:
    """Return a class of responses that reject interim responses (status 1xx), of which aiohttp reads any number."""
    import aiohttp

    class FinalResponse(aiohttp.ClientResponse):
        async def start(self, connection: Any) -> aiohttp.ClientResponse:
            read = connection.protocol.read

            async def read_final() -> Any:
                message, payload = await read()
                if message.code < 200:
                    raise aiohttp.ClientResponseError(self.request_info, (), message=f"interim status {message.code}")
                return message, payload

            connection.protocol.read = read_final
            return await super().start(connection)

    return FinalResponse


def _url(address: Address, target: str) -> Any:
    from yarl import URL

    if isinstance(address, Path):
        return URL(f"http://desktop{target}", encoded=True)
    host = address[0].strip("[]")
    return URL(f"http://{f'[{host}]' if ':' in host else host}:{address[1]}{target}", encoded=True)


async def _read_body(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """Return the body, or the beginning of the body of an error; raises DesktopError if it is not bounded."""
    length = response.content_length
    if length is None:
        raise DesktopError("the guest server sent a response without a length")
    limit = max_bytes if response.status == 200 else min(length, STATUS_BYTES)
    if response.status == 200 and length > max_bytes:
        raise ResponseTooLarge(f"the guest server announced {length} bytes, and at most {max_bytes} bytes are allowed")
    pieces, num_bytes = [], 0
    while num_bytes < limit and (piece := await response.content.readany()):
        pieces.append(piece)
        num_bytes += len(piece)
    return b"".join(pieces)[:limit]
