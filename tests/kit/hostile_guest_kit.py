"""Guest server under an attacker's control: answers every request in one chosen hostile form."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import socketserver
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Form = Callable[[socket.socket], None]
_CHUNK = bytes(65536)
_MAX_SERVED_BYTES = 2 * 1024**3
_DRIP_S = 0.02


def reply(body: bytes, status: str = "200 OK", *headers: str) -> Form:
    """Return a form that sends a complete response with this body."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    data = "\r\n".join(lines).encode("latin-1") + body
    return lambda connection: connection.sendall(data)


def raw(data: bytes) -> Form:
    """Return a form that sends these bytes and closes the connection."""
    return lambda connection: connection.sendall(data)


def endless(head: bytes, piece: bytes) -> Form:
    """Return a form that sends `head`, then `piece` without end."""

    def send(connection: socket.socket) -> None:
        connection.sendall(head)
        many = piece * max(1, len(_CHUNK) // len(piece))
        for _ in range(_MAX_SERVED_BYTES // len(many)):
            connection.sendall(many)

    return send


def drip(head: bytes, piece: bytes = b"x") -> Form:
    """Return a form that sends `head`, then one small piece at a time without end."""

    def send(connection: socket.socket) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(piece)
            time.sleep(_DRIP_S)

    return send


def silent(connection: socket.socket) -> None:
    """Send nothing until the client closes the connection."""
    while connection.recv(65536):
        pass


def then_silence(data: bytes) -> Form:
    """Return a form that sends these bytes and keeps the connection open."""

    def send(connection: socket.socket) -> None:
        connection.sendall(data)
        silent(connection)

    return send


_OK = b"HTTP/1.1 200 OK\r\n"
_HUGE = _OK + b"Content-Length: 1000000000000\r\n\r\n"
_NESTED = b'{"a":' * 200_000

INVALID_FORMS: dict[str, Form] = {
    "silence": silent,
    "closed connection": raw(b""),
    "no HTTP": raw(b"SSH-2.0-OpenSSH_9.2\r\n"),
    "binary": raw(bytes(range(256)) * 16),
    "10^12 announced bytes": endless(_HUGE, _CHUNK),
    "10^12 announced bytes, then silence": then_silence(_HUGE),
    "a length above any integer": raw(_OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n"),
    "a negative length": raw(_OK + b"Content-Length: -1\r\n\r\n"),
    "chunks without end": endless(_OK + b"Transfer-Encoding: chunked\r\n\r\n", b"400\r\n" + bytes(1024) + b"\r\n"),
    "chunks of one byte": endless(_OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    "chunked reply": raw(_OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"),
    "no length": raw(_OK + b"\r\n{}"),
    "no length, without end": endless(_OK + b"\r\n", _CHUNK),
    "incomplete body": raw(_OK + b"Content-Length: 4000\r\n\r\n{}"),
    "headers without end": endless(_OK, b"X-A: b\r\n"),
    "one header without end": endless(_OK + b"X-A: ", _CHUNK.replace(b"\0", b"a")),
    "status line without end": endless(b"HTTP/1.1 200 ", _CHUNK.replace(b"\0", b"a")),
    "interim responses without end": endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "dripping header": drip(_OK + b"X-A: "),
    "dripping body": drip(_OK + b"Content-Length: 4000\r\n\r\n"),
    "redirect": reply(b"", "302 Found", "Location: http://169.254.169.254/latest/meta-data/"),
    "error page": reply(b"<html>" + b"x" * 10_000_000, "500 Internal Server Error"),
    "nested error": reply(_NESTED, "500 Internal Server Error"),
}
"""Responses that are valid for no operation of a desktop."""

_SCREEN = ("X-Width: 320", "X-Height: 200")

BODY_FORMS: dict[str, Form] = {
    "web page": reply(b"<!doctype html><title>Sign in</title>", "200 OK", "Content-Type: text/html"),
    "empty body": reply(b""),
    "compressed body": reply(zlib.compress(bytes(10_000_000)), "200 OK", "Content-Encoding: deflate"),
    "no fields": reply(b"{}"),
    "wrong types": reply(b'{"returncode": "0", "output": [1], "error": {"a": null}}'),
    "array": reply(b"[[1], 2, null]"),
    "string": reply(b'"text"'),
    "NaN": reply(b'{"returncode": NaN, "output": "", "error": ""}'),
    "huge number": reply(b'{"returncode": 1' + b"0" * 10_000 + b', "output": "", "error": ""}'),
    "invalid UTF-8": reply(b'{"returncode": 0, "output": "\xff", "error": ""}'),
    "deep nesting": reply(b'{"returncode": 0, "output": "", "error": "", "x": ' + b"[" * 200_000),
    "many arrays": reply(b'{"x": [' + b"[]," * 2_000_000 + b"[]]}"),
    "wrong screen size": reply(bytes(4 * 9), "200 OK", "X-Width: 3", "X-Height: 3"),
    "huge screen size": reply(bytes(16), "200 OK", "X-Width: 1000000", "X-Height: 1000000"),
    "rows of a frame that was not sent": reply(b"", "200 OK", *_SCREEN, "X-Rows: "),
    "rows that are not numbers": reply(b"", "200 OK", *_SCREEN, "X-Rows: \xb2-3"),
    "frame id that is not one": reply(bytes(4 * 320 * 200), "200 OK", *_SCREEN, "X-Frame: a b"),
    "screen size that is not a number": reply(bytes(16), "200 OK", "X-Width: \xb2", "X-Height: -1"),
}
"""Complete responses whose body is invalid for the operations that use it."""


class HostileGuest:
    """Running hostile guest server. `form` may be exchanged between requests."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.form: Form = silent
        self.num_requests = 0


@contextmanager
def hostile_guest(path: Path) -> Iterator[HostileGuest]:
    """Serve hostile responses on a Unix socket for the duration of the block."""
    guest = HostileGuest(path)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            guest.num_requests += 1
            with contextlib.suppress(OSError):
                self.request.recv(65536)
                guest.form(self.request)
                self.request.shutdown(socket.SHUT_WR)
                silent(self.request)  # a close with unread data would reset the connection

    class Server(socketserver.ThreadingUnixStreamServer):
        daemon_threads = True
        block_on_close = False
        request_queue_size = 64

    with Server(str(path), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield guest
        finally:
            server.shutdown()


def png(width: int, height: int) -> bytes:
    """Return a PNG of one colour that is small for its size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    pixels = b"".join([*(packer.compress(row) for _ in range(height)), packer.flush()])
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)  # one bit per pixel
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


class Heartbeat:
    """Counts the turns of the event loop, and measures the processor time of its thread in each, while work runs."""

    def __init__(self) -> None:
        self.longest_turn_cpu_s = 0.0
        self.num_beats = 0

    async def _beat(self) -> None:
        last_s = time.thread_time()  # unlike elapsed time, the same on a busy machine
        while True:
            await asyncio.sleep(0.01)
            now_s = time.thread_time()
            self.longest_turn_cpu_s = max(self.longest_turn_cpu_s, now_s - last_s)
            self.num_beats += 1
            last_s = now_s

    async def __aenter__(self) -> Heartbeat:
        self._task = asyncio.create_task(self._beat())
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *_: Any) -> None:
        await asyncio.sleep(0.02)
        self._task.cancel()


class MemoryPeak:
    """Growth of this process's resident memory above its level at the start of the block."""

    growth_bytes = 0

    def __enter__(self) -> MemoryPeak:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        self._start_bytes = _status_bytes("VmRSS")
        return self

    def __exit__(self, *_: Any) -> None:
        self.growth_bytes = _status_bytes("VmHWM") - self._start_bytes


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
