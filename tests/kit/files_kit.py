"""A web server of files, and of what goes wrong with them."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HANGS_UP = 0


@dataclass
class Site:
    """What is served at `url`, and what was asked for."""

    files: dict[str, bytes] = field(default_factory=dict)
    """Contents by path, as "/a.bin"."""
    statuses: dict[str, list[int]] = field(default_factory=dict)
    """Answers without a file that a path gives first, one after another; HANGS_UP for none."""
    breaks_after: dict[str, list[int]] = field(default_factory=dict)
    """After how many bytes a path's next answers break off, one after another."""
    types: dict[str, str] = field(default_factory=dict)
    validators: bool = True
    """Whether the server says by ETag which state of a file it serves."""
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and Range of each request."""
    url: str = ""

    def address(self, path: str) -> str:
        """Where a path is served."""
        return self.url + path


@contextmanager
def serving(site: Site) -> Iterator[Site]:
    """Serve `site` on a port of its own until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            _answer(self, site)

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


def _answer(handler: BaseHTTPRequestHandler, site: Site) -> None:
    path, wanted = handler.path, handler.headers["Range"]
    site.asked.append((path, wanted))
    if site.statuses.get(path):
        status = site.statuses[path].pop(0)
        if status != HANGS_UP:
            handler.send_error(status)
        return
    if path not in site.files:
        handler.send_error(404)
        return
    data = site.files[path]
    tag = f'"{hashlib.sha256(data).hexdigest()}"'
    begins = 0
    if wanted and handler.headers["If-Range"] == tag:
        begins = int(wanted.removeprefix("bytes=").removesuffix("-"))
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes {begins}-{len(data) - 1}/{len(data)}")
    else:
        handler.send_response(200)
    if site.validators:
        handler.send_header("ETag", tag)
    handler.send_header("Content-Type", site.types.get(path, "application/octet-stream"))
    handler.send_header("Content-Length", str(len(data) - begins))
    handler.end_headers()
    breaks = site.breaks_after.get(path)
    handler.wfile.write(data[begins : begins + breaks.pop(0)] if breaks else data[begins:])
