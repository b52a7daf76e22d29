"""The viewer's HTTP: the standard library's server on the loopback address, for a person and a browser.

Knows HTTP and nothing of pages. It only ever answers GET and HEAD; a request that names another host is refused, so
that no page on the web can read a run by having its own name point at this machine.
"""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, unquote, urlsplit

from deskrl.core.errors import UserError
from deskrl.replay.viewer.site import Reply, Site

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; style-src 'self' 'unsafe-inline'; "
    "script-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_OWN_NAMES = ("127.0.0.1", "localhost", "::1")


class ViewerServer(ThreadingHTTPServer):
    """Serves a site until `shutdown`.

    Args:
        site: the pages.
        port: on the loopback address; 0: a free one.

    Raises:
        UserError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, site: Site, port: int) -> None:
        self.site = site
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            raise UserError(f"port {port} cannot be listened on: {error}", "choose another one with --port") from error

    @property
    def url(self) -> str:
        """Where it is to be found."""
        return f"http://127.0.0.1:{self.server_address[1]}/"


class _Handler(BaseHTTPRequestHandler):
    server: ViewerServer
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        """Answer with a page."""
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        """Answer without the page."""
        self._answer(with_body=False)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing of each request."""

    def _answer(self, *, with_body: bool) -> None:
        host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        if host not in _OWN_NAMES:
            reply = Reply(421, "text/plain", b"this server is 127.0.0.1; ask for it by that name\n")
        else:
            address = urlsplit(self.path)
            reply = self.server.site.reply(unquote(address.path), dict(parse_qsl(address.query)))
        self.send_response(reply.status)
        self.send_header("Content-Type", f"{reply.content_type}; charset=utf-8")
        self.send_header("Content-Length", str(len(reply.body)))
        self.send_header("Cache-Control", "max-age=31536000, immutable" if reply.is_immutable else "no-store")
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(reply.body)
