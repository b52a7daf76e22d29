"""HTTP server that serves files and injects failures: error statuses, hang-ups and truncated responses."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HANG_UP = 0
"""Status that closes the connection without a response."""


@dataclass
class Site:
    """Files served at `url`, the failures to inject, and the requests received."""

    files: dict[str, bytes] = field(default_factory=dict)
    """File contents by path, such as "/a.bin"."""
    statuses: dict[str, list[int]] = field(default_factory=dict)
    """Statuses of the first responses of a path, in order, each without the file; HANG_UP for no response."""
    breaks_after: dict[str, list[int]] = field(default_factory=dict)
    """Numbers of bytes after which the next responses of a path are truncated, in order."""
    content_types: dict[str, str] = field(default_factory=dict)
    """Content types by path; default: application/octet-stream."""
    sends_etags: bool = True
    """Whether responses contain an ETag, which identifies the version of a file."""
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and Range header of each request."""
    url: str = ""

    def address(self, path: str) -> str:
        """Return the URL of a path."""
        return self.url + path


@contextmanager
def serving(site: Site) -> Iterator[Site]:
    """Serve `site` on a free port until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            _respond(self, site)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _respond(handler: BaseHTTPRequestHandler, site: Site) -> None:
    path, byte_range = handler.path, handler.headers["Range"]
    site.requests.append((path, byte_range))
    if site.statuses.get(path):
        status = site.statuses[path].pop(0)
        if status != HANG_UP:
            handler.send_error(status)
        return
    if path not in site.files:
        handler.send_error(404)
        return
    data = site.files[path]
    tag = f'"{hashlib.sha256(data).hexdigest()}"'
    start = 0
    if byte_range and handler.headers["If-Range"] == tag:
        start = int(byte_range.removeprefix("bytes=").removesuffix("-"))
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
    else:
        handler.send_response(200)
    if site.sends_etags:
        handler.send_header("ETag", tag)
    handler.send_header("Content-Type", site.content_types.get(path, "application/octet-stream"))
    handler.send_header("Content-Length", str(len(data) - start))
    handler.end_headers()
    lengths = site.breaks_after.get(path)
    handler.wfile.write(data[start : start + lengths.pop(0)] if lengths else data[start:])
