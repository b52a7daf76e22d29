"""Controlled browser: a browser of the session whose DevTools connection only the guest server holds.

The connection is a socket pair instead of a port or a pipe: every program of the session could connect to a port, and
open a pipe of another process through `/proc/PID/fd`. A socket cannot be opened in this way.

Of the events, the first `_MAX_EVENTS` with the requested methods are kept, so that later ones cannot displace them.
Every page other than the first one is closed at once: keys open tabs in all modes of the browser, and a tab may show
developer tools.
"""

from __future__ import annotations

import itertools
import json
import os
import queue
import socket
import threading
from collections.abc import Sequence
from typing import Any

from deskrl.actor.guest.session import Session
from deskrl.actor.guest.session_sandbox import HOME

_MAX_EVENTS = 64
_MAX_EVENT_CHARACTERS = 4096
_MAX_MESSAGE_BYTES = 4 * 1024**2
_CHUNK_BYTES = 65536
_NO_REPLY_ID = 0
_CONNECT_SCRIPT = 'exec "$@" 3<&1 4>&1 >/dev/null'
"""Chromium reads from descriptor 3 and writes to descriptor 4. The spawner passes the socket as the standard output."""


class BrowserError(RuntimeError):
    """The browser is not running, does not reply, or rejected a call."""


class ControlledBrowser:
    """At most one controlled browser of a session. Thread-safe, one call at a time.

    Args:
        session: session in which the browser runs.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._socket: socket.socket | None = None
        self._call_lock, self._send_lock = threading.Lock(), threading.Lock()
        self._numbers = itertools.count(_NO_REPLY_ID + 1)
        self._replies: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._methods: frozenset[str] = frozenset()
        self._events: list[dict[str, Any]] = []
        self._page: str | None = None

    def start(self, command: Sequence[str], methods: Sequence[str]) -> None:
        """Start the browser with a DevTools connection on descriptors 3 and 4.

        Args:
            command: command line, with `--remote-debugging-pipe`.
            methods: methods of the events to keep.

        Raises:
            OSError: the shell that starts it cannot be executed.
            BrowserError: a browser was started before.
        """
        if self._socket is not None:
            raise BrowserError("a controlled browser was started before")
        self._methods = frozenset(methods)
        self._socket, remote = socket.socketpair()
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            words = ["/bin/sh", "-c", _CONNECT_SCRIPT, "sh", *command]
            output = (remote.fileno(), null)
            self._session.spawner.spawn(words, self._session.environment, folder=HOME, output=output).forget()
        finally:
            remote.close()
            os.close(null)
        threading.Thread(target=self._read, args=(self._socket,), daemon=True).start()
        self._send({"id": _NO_REPLY_ID, "method": "Target.setDiscoverTargets", "params": {"discover": True}})

    def call(self, method: str, parameters: dict[str, Any], session_id: str | None, timeout_s: float) -> dict[str, Any]:
        """Call a DevTools method and return its result; raises BrowserError."""
        with self._call_lock:
            number = next(self._numbers)
            message = {"id": number, "method": method, "params": parameters}
            self._send(message if session_id is None else message | {"sessionId": session_id})
            while True:
                try:
                    reply = self._replies.get(timeout=timeout_s)
                except queue.Empty:
                    raise BrowserError(f"the browser did not reply to {method} within {timeout_s:g} s") from None
                if not reply:
                    self._replies.put(reply)
                    raise BrowserError("the browser has exited")
                if reply.get("id") == number:
                    break
        if "error" in reply:
            raise BrowserError(f"{method}: {reply['error'].get('message')}")
        result: dict[str, Any] = reply["result"]
        return result

    def events(self) -> list[dict[str, Any]]:
        """Return the kept events in the order of their arrival; also after the end of the browser."""
        return list(self._events)

    def _send(self, message: dict[str, Any]) -> None:
        if self._socket is None:
            raise BrowserError("no controlled browser was started")
        try:
            with self._send_lock:
                self._socket.sendall(json.dumps(message).encode() + b"\0")
        except OSError as error:
            raise BrowserError("the browser has exited") from error

    def _read(self, connection: socket.socket) -> None:
        """Handle messages until the browser ends or sends one above the limit; an empty reply marks the end."""
        buffer = bytearray()
        try:
            while len(buffer) <= _MAX_MESSAGE_BYTES and (data := connection.recv(_CHUNK_BYTES)):
                buffer += data
                *messages, rest = buffer.split(b"\0") if b"\0" in data else [buffer]
                for message in messages:
                    self._handle(json.loads(message))
                buffer = rest
        except (OSError, ValueError, BrowserError):
            pass
        finally:
            self._replies.put({})

    def _handle(self, message: dict[str, Any]) -> None:
        method = message.get("method")
        if method is None:
            if message.get("id") != _NO_REPLY_ID:
                self._replies.put(message)
        elif method == "Target.targetCreated":
            self._keep_first_page(message["params"]["targetInfo"])
        elif method in self._methods and len(self._events) < _MAX_EVENTS and _is_short(message):
            self._events.append(message)

    def _keep_first_page(self, target: dict[str, Any]) -> None:
        if target["type"] != "page":
            return
        if self._page is None:
            self._page = target["targetId"]
        elif target["targetId"] != self._page:
            arguments = {"targetId": target["targetId"]}
            self._send({"id": _NO_REPLY_ID, "method": "Target.closeTarget", "params": arguments})


def _is_short(message: dict[str, Any]) -> bool:
    return len(json.dumps(message)) <= _MAX_EVENT_CHARACTERS
