"""HTTP server over a listening socket: maps routes to functions, one thread per connection.

Hand-written because importing the standard library's `http.server` takes longer than importing everything else here,
and it would be imported at every reset of a desktop.
"""

from __future__ import annotations

import json
import socket
import socketserver
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

_MAX_LINE_BYTES = 65536
_PHRASES = {200: "OK", 400: "Bad Request", 404: "Not Found", 408: "Request Timeout", 500: "Internal Server Error"}


class Request(NamedTuple):
    """One complete request."""

    query: Mapping[str, str]
    content_type: str
    body: bytes

    def json(self) -> dict[str, Any]:
        """Return the body as a JSON object; raises BadRequest if it is not one."""
        try:
            value = json.loads(self.body or b"{}")
        except ValueError as error:
            raise BadRequest(f"the body is not valid JSON: {error}") from error
        if not isinstance(value, dict):
            raise BadRequest("the body is not a JSON object")
        return value

    def form(self) -> dict[str, bytes]:
        """Return the fields of a form, URL-encoded or multipart."""
        if self.content_type.startswith("multipart/form-data"):
            return _parse_multipart(self.content_type, self.body)
        fields = parse_qs(self.body.decode("utf-8", "replace"), keep_blank_values=True)
        return {name: values[-1].encode() for name, values in fields.items()}


class Response(NamedTuple):
    """One response."""

    body: bytes = b""
    status: int = 200
    content_type: str = "application/octet-stream"
    headers: Mapping[str, str] = MappingProxyType({})


class BadRequest(ValueError):
    """Invalid request; the response has status 400."""


Handler = Callable[[Request], Response]
Routes = Mapping[tuple[str, str], Handler]


def json_response(value: Any, status: int = 200) -> Response:
    """Return a response with `value` as JSON."""
    return Response(json.dumps(value).encode(), status, "application/json")


def text_response(text: str, status: int = 200) -> Response:
    """Return a plain-text response with the content type that OSWorld's server uses."""
    return Response(text.encode(), status, "text/html; charset=utf-8")


class HttpServer(socketserver.ThreadingMixIn, socketserver.BaseServer):
    """Serves `routes` to all clients that connect to `listener`."""

    daemon_threads = True

    def __init__(self, listener: socket.socket, routes: Routes) -> None:
        super().__init__("", _make_handler(routes))
        self.socket = listener

    def fileno(self) -> int:
        """Return the descriptor that `serve_forever` waits for."""
        return self.socket.fileno()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection."""
        return self.socket.accept()

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        request.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors of a connection: the client has closed it."""


def _make_handler(routes: Routes) -> type[socketserver.StreamRequestHandler]:
    class _Handler(socketserver.StreamRequestHandler):
        wbufsize = -1

        def handle(self) -> None:
            while self._serve_one():
                self.wfile.flush()

        def _serve_one(self) -> bool:
            """Serve one request and return whether the connection stays open."""
            words = self.rfile.readline(_MAX_LINE_BYTES).decode("latin-1").split()
            if len(words) != 3:
                return False
            method, target, version = words
            headers = dict(self._headers())
            length = int(headers.get("content-length") or 0)
            if headers.get("expect", "").lower() == "100-continue":
                self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                self.wfile.flush()
            parts = urlsplit(target)
            query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
            request = Request(query, headers.get("content-type", ""), self.rfile.read(length))
            self._send(_call(routes.get((method, parts.path)), request))
            return version == "HTTP/1.1" and headers.get("connection", "").lower() != "close"

        def _headers(self) -> Iterator[tuple[str, str]]:
            while line := self.rfile.readline(_MAX_LINE_BYTES).decode("latin-1").strip():
                name, _, value = line.partition(":")
                yield name.strip().lower(), value.strip()

        def _send(self, response: Response) -> None:
            head = {"Content-Type": response.content_type, "Content-Length": str(len(response.body))}
            lines = [f"HTTP/1.1 {response.status} {_PHRASES.get(response.status, 'Status')}"]
            lines += [f"{name}: {value}" for name, value in (head | dict(response.headers)).items()]
            self.wfile.write("\r\n".join([*lines, "", ""]).encode("latin-1"))
            self.wfile.write(response.body)

    return _Handler


def _call(handler: Handler | None, request: Request) -> Response:
    if handler is None:
        return json_response({"error": "unknown route"}, 404)
    try:
        return handler(request)
    except BadRequest as error:
        return json_response({"error": str(error)}, 400)
    except Exception as error:  # any error of a handler is reported in its response, as in OSWorld's server
        import traceback

        traceback.print_exc()
        return json_response({"status": "error", "message": f"{type(error).__name__}: {error}"}, 500)


def _parse_multipart(content_type: str, body: bytes) -> dict[str, bytes]:
    from email.message import Message

    header = Message()
    header["Content-Type"] = content_type
    boundary = header.get_param("boundary")
    if not isinstance(boundary, str):
        raise BadRequest("the multipart content type has no boundary")
    fields = {}
    for part in body.split(b"--" + boundary.encode())[1:-1]:
        head, _, data = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        disposition = Message()
        for line in head.decode("utf-8", "replace").splitlines():
            name, _, value = line.partition(":")
            disposition[name.strip()] = value.strip()
        field_name = disposition.get_param("name", header="content-disposition")
        if isinstance(field_name, str):
            fields[field_name] = data.removesuffix(b"\r\n")
    return fields
