"""Connection to the X server that programs of the session can neither lock out nor end for long.

A program can grab the server, which stops the requests of all other connections, and close the connection of any other
client (KillClient). The first is prevented by the XTEST extension, after the second a new connection is made.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from Xlib.display import Display
from Xlib.error import ConnectionClosedError, xerror_class
from Xlib.ext import xtest

_T = TypeVar("_T")
_NUM_ATTEMPTS = 10


class XConnection:
    """Connection to one X server. Thread-safe.

    Args:
        name: name of the display, such as ":0".
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.RLock()
        self._display = self._connect()

    def call(self, operation: Callable[[Display], _T]) -> _T:
        """Call `operation` with the display and return its result.

        If the connection ends meanwhile, the operation is repeated on a new one. It must therefore create its resources
        anew, and repeating it must not hurt.

        Raises:
            ConnectionClosedError: the connection ended repeatedly.
            DisplayConnectionError: the X server does not accept a connection.
        """
        with self._lock:
            for _ in range(_NUM_ATTEMPTS - 1):
                try:
                    return operation(self._display)
                except (ConnectionClosedError, BrokenPipeError, ConnectionResetError):
                    self._display = self._connect()
            return operation(self._display)

    def _connect(self) -> Display:
        display = Display(self._name)
        # python-xlib's RandR replaces errors of the core protocol, such as BadValue, by classes that it cannot create.
        display.display.error_classes.update(xerror_class)
        xtest.grab_control(display, True)
        return display
