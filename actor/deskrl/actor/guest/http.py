"""A small HTTP server over a listening socket: routes to functions, one thread a connection. Knows no desktop.

The standard library's costs more time to import than all else here together, at every reset of a desktop.
"""

from __future__ import annotations

import json
import socket
import socketserver
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

_MAX_LINE_BYTES = 65536
_PHRASES = {200: "OK", 400: "Bad Request", 404: "Not Found", 408: "Request Timeout", 500: "Internal Server Error"}


@dataclass(frozen=True)
class Request:
    """One request, read whole."""

    query: Mapping[str, str]
    content_type: str
    body: bytes

    def json(self) -> dict[str, Any]:
        """The body as a JSON object; raises BadRequest if it is none."""
        try:
            value = json.loads(self.body or b"{}")
        except ValueError as error:
            raise BadRequest(f"not JSON: {error}") from error
        if not isinstance(value, dict):
            raise BadRequest("not a JSON object")
        return value

    def form(self) -> dict[str, bytes]:
        """The fields of a form, urlencoded or multipart."""
        if self.content_type.startswith("multipart/form-data"):
            return _parse_multipart(self.content_type, self.body)
        fields = parse_qs(self.body.decode("utf-8", "replace"), keep_blank_values=True)
        return {name: values[-1].encode() for name, values in fields.items()}


@dataclass(frozen=True)
class Response:
    """One answer."""

    body: bytes = b""
    status: int = 200
    content_type: str = "application/octet-stream"
    headers: Mapping[str, str] = field(default_factory=dict)


class BadRequest(ValueError):
    """The request makes no sense; answered with status 400."""


Handler = Callable[[Request], Response]
Routes = Mapping[tuple[str, str], Handler]


def json_response(value: Any, status: int = 200) -> Response:
    """`value` as JSON."""
    return Response(json.dumps(value).encode(), status, "application/json")


def text_response(text: str, status: int = 200) -> Response:
    """Plain text, under the type that OSWorld's server gives it."""
    return Response(text.encode(), status, "text/html; charset=utf-8")


class Server(socketserver.ThreadingMixIn, socketserver.BaseServer):
    """Serves `routes` to whoever connects to `listener`."""

    daemon_threads = True

    def __init__(self, listener: socket.socket, routes: Routes) -> None:
        super().__init__("", _make_handler(routes))
        self.socket = listener

    def fileno(self) -> int:
        """For the selector of `serve_forever`."""
        return self.socket.fileno()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection."""
        return self.socket.accept()

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        request.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is nothing to report."""


def _make_handler(routes: Routes) -> type[socketserver.StreamRequestHandler]:
    class _Handler(socketserver.StreamRequestHandler):
        wbufsize = -1

        def handle(self) -> None:
            while self._answer_one():
                self.wfile.flush()

        def _answer_one(self) -> bool:
            """Answer one request; whether the connection is for another."""
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
        return json_response({"error": "no such route"}, 404)
    try:
        return handler(request)
    except BadRequest as error:
        return json_response({"error": str(error)}, 400)
    except Exception as error:  # whatever a request runs into is the answer to it, as in OSWorld's server
        traceback.print_exc()
        return json_response({"status": "error", "message": f"{type(error).__name__}: {error}"}, 500)


def _parse_multipart(content_type: str, body: bytes) -> dict[str, bytes]:
    from email.message import Message

    header = Message()
    header["Content-Type"] = content_type
    boundary = header.get_param("boundary")
    if not isinstance(boundary, str):
        raise BadRequest("multipart without a boundary")
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
