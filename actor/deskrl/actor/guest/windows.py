"""Top-level windows as the window manager lists them (EWMH). Knows titles and classes, no applications."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

from Xlib import X, Xatom
from Xlib.display import Display
from Xlib.error import XError
from Xlib.protocol.event import ClientMessage

_POLL_S = 0.02
_SOURCE_PAGER = 2  # EWMH's source indication: the request comes from the user


@dataclass(frozen=True)
class Window:
    """One managed window; `window_class` is "instance.class" as wmctrl prints it."""

    id: int
    title: str
    window_class: str
    x: int
    y: int
    width: int
    height: int

    def record(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def matches(self, name: str, *, strict: bool = False, by_class: bool = False) -> bool:
        """OSWorld's rule, which is wmctrl's: part of the title (or class) in any case, or with `strict` all of it."""
        text = self.window_class if by_class else self.title
        return text == name if strict else name.lower() in text.lower()


class Windows:
    """The windows of one display. Methods may be called from any thread."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._root = display.screen().root
        self._lock = threading.RLock()
        self._unmapped = self._root.create_window(0, 0, 1, 1, 0, X.CopyFromParent)

    def manager_answers(self) -> bool:
        """Whether a window manager runs and does what it is asked for: it names itself a moment before it does, and a
        window that an application opens in between may never be shown."""
        with self._lock:
            if self._property(self._root, "_NET_SUPPORTING_WM_CHECK") is None:
                return False
            self._ask(self._unmapped.id, "_NET_REQUEST_FRAME_EXTENTS")
            return self._property(self._unmapped, "_NET_FRAME_EXTENTS") is not None

    def list(self) -> list[Window]:
        """Windows, oldest first."""
        with self._lock:
            ids = self._property(self._root, "_NET_CLIENT_LIST")
            found = (self._describe(int(window)) for window in (ids if ids is not None else ()))
            return [window for window in found if window is not None]

    def find(self, name: str, *, strict: bool = False, by_class: bool = False) -> Window | None:
        """The newest window of that name."""
        matching = [window for window in self.list() if window.matches(name, strict=strict, by_class=by_class)]
        return matching[-1] if matching else None

    def wait_for(self, name: str, timeout_s: float) -> Window | None:
        """Wait for a window whose title or class contains `name`."""
        return self.wait_until(lambda window: window.matches(name) or window.matches(name, by_class=True), timeout_s)

    def wait_until(self, wanted: Any, timeout_s: float) -> Window | None:
        """Wait for a window that `wanted` accepts; None if the time is over."""
        deadline = time.monotonic() + timeout_s
        while True:
            for window in self.list():
                if wanted(window):
                    return window
            if time.monotonic() >= deadline:
                return None
            time.sleep(_POLL_S)

    def activate(self, window: Window) -> None:
        """Bring a window to the front and give it the focus."""
        self._ask(window.id, "_NET_ACTIVE_WINDOW", _SOURCE_PAGER)

    def close(self, window: Window) -> None:
        """Ask a window to close."""
        self._ask(window.id, "_NET_CLOSE_WINDOW", X.CurrentTime, _SOURCE_PAGER)

    def _ask(self, window_id: int, request: str, *data: int) -> None:
        with self._lock:
            event = ClientMessage(
                window=self._display.create_resource_object("window", window_id),
                client_type=self._display.intern_atom(request),
                data=(32, [*data, *[0] * (5 - len(data))]),
            )
            self._root.send_event(event, event_mask=X.SubstructureRedirectMask | X.SubstructureNotifyMask)
            self._display.sync()

    def _describe(self, window_id: int) -> Window | None:
        window = self._display.create_resource_object("window", window_id)
        try:
            title = self._text(window, "_NET_WM_NAME") or self._text(window, "WM_NAME")
            names = self._text(window, "WM_CLASS").split("\0")
            geometry = window.get_geometry()
            corner = self._root.translate_coords(window, 0, 0)
        except XError:  # it closed meanwhile
            return None
        window_class = ".".join(name for name in names if name)
        return Window(window_id, title, window_class, corner.x, corner.y, geometry.width, geometry.height)

    def _text(self, window: Any, name: str) -> str:
        value = self._property(window, name)
        if value is None:
            return ""
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)

    def _property(self, window: Any, name: str) -> Any:
        reply = window.get_full_property(self._display.intern_atom(name), X.AnyPropertyType)
        if reply is None:
            return None
        if reply.property_type == Xatom.STRING and isinstance(reply.value, bytes):
            return reply.value.decode("latin-1")
        return reply.value
