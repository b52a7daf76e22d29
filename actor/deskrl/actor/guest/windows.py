"""Top-level windows, as listed by the window manager (EWMH), and the processes that own them (X-Resource extension).

Everything that programs write about their windows is read with a size limit.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from Xlib import X, Xatom
from Xlib.display import Display
from Xlib.error import XError
from Xlib.ext import res
from Xlib.protocol.event import ClientMessage

from deskrl.actor.guest.x_connection import XConnection

_POLL_S = 0.02
_MAX_WINDOWS, _MAX_TREE_WINDOWS = 1000, 20_000
_MAX_ATOMS = 16
_MAX_TEXT_WORDS = 1024
"""Size limit of a text property in units of four bytes."""
_SOURCE_PAGER = 2  # EWMH source indication: direct user action


class Window(NamedTuple):
    """One managed window; `window_class` is "instance.class", as printed by wmctrl."""

    id: int
    title: str
    window_class: str
    x: int
    y: int
    width: int
    height: int
    is_splash: bool
    """Whether the application declares the window as a splash screen."""
    stack_position: int | None
    """A window covers those with lower positions; None if it is minimised."""

    def to_record(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return self._asdict()

    def matches(self, name: str, *, strict: bool = False, by_class: bool = False) -> bool:
        """Return whether the title (or class) contains `name` in any case, or equals it if `strict`, as in wmctrl."""
        text = self.window_class if by_class else self.title
        return text == name if strict else name.lower() in text.lower()


class Windows:
    """Windows of one display. Thread-safe.

    Args:
        connection: connection to the X server.
    """

    def __init__(self, connection: XConnection) -> None:
        self._connection = connection
        self._probe: tuple[Display, Any] | None = None

    def is_manager_ready(self) -> bool:
        """Return whether a window manager runs and processes requests; has to be called repeatedly until it does.

        A window manager announces itself slightly before it processes requests, and a window that an application opens
        in between may never be shown.
        """

        def ask(display: Display) -> bool:
            root = display.screen().root
            if _property(display, root, "_NET_SUPPORTING_WM_CHECK", 1) is None:
                return False
            if self._probe is None or self._probe[0] is not display:
                self._probe = (display, root.create_window(0, 0, 1, 1, 0, X.CopyFromParent))
            _send_message(display, self._probe[1].id, "_NET_REQUEST_FRAME_EXTENTS")
            return _property(display, self._probe[1], "_NET_FRAME_EXTENTS", 4) is not None

        return self._connection.call(ask)

    def expect_new_manager(self) -> None:
        """Let `is_manager_ready` ask anew, because the window manager is being replaced."""
        self._probe = None

    def list(self) -> list[Window]:
        """Return all windows, oldest first."""
        return self._connection.call(_list)

    def owners(self, windows: Sequence[Window]) -> dict[int, int]:
        """Return the process ids of the windows' owners, in the X server's namespace, by window id.

        The kernel reports them when a program connects to the X server, so that no program can choose them.
        """
        return self._connection.call(lambda display: {window.id: _owner(display, window.id) for window in windows})

    def kill_orphans(self, is_kept: Callable[[int], bool]) -> None:
        """Remove the windows of all clients for whose process id, in the X server's namespace, `is_kept` is false.

        A program can let the X server keep its windows after its end.
        """

        def kill(display: Display) -> None:
            own = display.display.info.resource_id_base
            mask = display.display.info.resource_id_mask
            for client, window_id in {window_id & ~mask: window_id for window_id in _tree(display)}.items():
                if client not in (own, 0) and not is_kept(_owner(display, window_id)):
                    with contextlib.suppress(XError):
                        display.create_resource_object("window", window_id).kill_client()
            display.sync()

        self._connection.call(kill)

    def repaint(self, background_colour: int) -> None:
        """Make all windows repaint themselves, and restore the background."""

        def cover(display: Display) -> None:
            screen = display.screen()
            paint_background(display, background_colour)
            size = (screen.width_in_pixels, screen.height_in_pixels)
            window = screen.root.create_window(0, 0, *size, 0, X.CopyFromParent, override_redirect=True)
            window.map()
            window.raise_window()
            display.sync()
            window.destroy()
            display.sync()

        self._connection.call(cover)

    def find(self, name: str, *, strict: bool = False, by_class: bool = False) -> Window | None:
        """Return the newest window that matches; None if there is none."""
        matching = [window for window in self.list() if window.matches(name, strict=strict, by_class=by_class)]
        return matching[-1] if matching else None

    def wait_for(self, name: str, timeout_s: float) -> Window | None:
        """Wait for a window whose title or class contains `name`; return None after `timeout_s`."""
        return self.wait_until(lambda window: window.matches(name) or window.matches(name, by_class=True), timeout_s)

    def wait_until(self, predicate: Callable[[Window], bool], timeout_s: float) -> Window | None:
        """Wait for a window that satisfies `predicate`; return None after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while True:
            for window in self.list():
                if predicate(window):
                    return window
            if time.monotonic() >= deadline:
                return None
            time.sleep(_POLL_S)

    def activate(self, window: Window) -> None:
        """Raise a window and give it the focus."""
        self._connection.call(lambda display: _send_message(display, window.id, "_NET_ACTIVE_WINDOW", _SOURCE_PAGER))

    def close(self, window: Window) -> None:
        """Ask a window to close."""
        request = ("_NET_CLOSE_WINDOW", X.CurrentTime, _SOURCE_PAGER)
        self._connection.call(lambda display: _send_message(display, window.id, *request))


def paint_background(display: Display, colour: int) -> None:
    """Fill the root window with a colour."""
    root = display.screen().root
    root.change_attributes(background_pixel=colour)
    root.clear_area()
    display.sync()


def _list(display: Display) -> list[Window]:
    stack = _listed_ids(display, "_NET_CLIENT_LIST_STACKING")
    found = (_describe(display, window, stack) for window in _listed_ids(display, "_NET_CLIENT_LIST"))
    return [window for window in found if window is not None]


def _listed_ids(display: Display, name: str) -> list[int]:
    ids = _property(display, display.screen().root, name, _MAX_WINDOWS)
    return [int(window) for window in (ids if ids is not None and not isinstance(ids, str) else ())]


def _tree(display: Display) -> list[int]:
    """Return all windows on the screen: a program can put its window into a window of another program."""
    found: list[int] = []
    pending = [display.screen().root]
    while pending and len(found) < _MAX_TREE_WINDOWS:
        with contextlib.suppress(XError):  # the window was closed meanwhile
            children = pending.pop().query_tree().children
            found += [child.id for child in children]
            pending += children
    return found


def _send_message(display: Display, window_id: int, request: str, *data: int) -> None:
    event = ClientMessage(
        window=display.create_resource_object("window", window_id),
        client_type=display.intern_atom(request),
        data=(32, [*data, *[0] * (5 - len(data))]),
    )
    mask = X.SubstructureRedirectMask | X.SubstructureNotifyMask
    display.screen().root.send_event(event, event_mask=mask)
    display.sync()


def _owner(display: Display, window_id: int) -> int:
    """Return the process id of a window's client; 0 if it is unknown."""
    mask = res.LocalClientPIDMask
    try:
        answer = display.res_query_client_ids([{"client": window_id, "mask": mask}])
    except XError:  # the window was closed meanwhile
        return 0
    return next((int(entry.value[0]) for entry in answer.ids if entry.spec.mask == mask and entry.value), 0)


def _describe(display: Display, window_id: int, stack: Sequence[int]) -> Window | None:
    window = display.create_resource_object("window", window_id)
    try:
        title = _text(display, window, "_NET_WM_NAME") or _text(display, window, "WM_NAME")
        names = _text(display, window, "WM_CLASS").split("\0")
        is_splash = _contains(display, window, "_NET_WM_WINDOW_TYPE", "_NET_WM_WINDOW_TYPE_SPLASH")
        is_minimised = _contains(display, window, "_NET_WM_STATE", "_NET_WM_STATE_HIDDEN")
        geometry = window.get_geometry()
        corner = display.screen().root.translate_coords(window, 0, 0)
    except XError:  # the window was closed meanwhile
        return None
    window_class = ".".join(name for name in names if name)
    position = stack.index(window_id) if window_id in stack and not is_minimised else None
    place = (corner.x, corner.y, geometry.width, geometry.height)
    return Window(window_id, title, window_class, *place, is_splash, position)


def _contains(display: Display, window: Any, name: str, atom: str) -> bool:
    """Return whether a property of a window is a list of atoms with this one among them."""
    atoms = _property(display, window, name, _MAX_ATOMS)
    return isinstance(atoms, Sequence) and display.intern_atom(atom) in atoms


def _text(display: Display, window: Any, name: str) -> str:
    value = _property(display, window, name, _MAX_TEXT_WORDS)
    if value is None:
        return ""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _property(display: Display, window: Any, name: str, max_words: int) -> Any:
    """Return the beginning of a property; None if the window does not have it."""
    reply = window.get_property(display.intern_atom(name), X.AnyPropertyType, 0, max_words)
    if reply is None:
        return None
    if reply.property_type == Xatom.STRING and isinstance(reply.value, bytes):
        return reply.value.decode("latin-1")
    return reply.value
