"""Noise window: a note above a corner of the screen, or a message that has the focus.

The source of this module is embedded in noisy task files, whose setup runs it on the desktop. It may therefore use
only the standard library and Xlib, both of which OSWorld's desktop has. The only argument is a JSON object with
`title`, `lines` and `place`. A window at the place `center` has the focus and disappears when it is closed or clicked.
A window at another place, such as `top-right`, never has the focus and stays. The program exits with status 0 once the
window is visible.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from Xlib import X, Xatom, Xutil
from Xlib.display import Display
from Xlib.protocol.event import ClientMessage

NOTE_SIZE, MESSAGE_SIZE, MARGIN, LINE_HEIGHT = (300, 90), (420, 160), 24, 20
SHOW_TIMEOUT_S = 10.0
FRAMELESS = [2, 0, 0, 0, 0]  # _MOTIF_WM_HINTS: flags for decorations, decorations 0


class NoiseWindow:
    """One window, which draws itself in the event loop of `serve`."""

    def __init__(self, title: str, lines: list[str], place: str) -> None:
        self._display = Display()
        self._lines = lines
        self._focused = place == "center"
        screen = self._display.screen()
        width, height = MESSAGE_SIZE if self._focused else NOTE_SIZE
        max_x, max_y = screen.width_in_pixels - width, screen.height_in_pixels - height
        x = max_x // 2 if self._focused else MARGIN if "left" in place else max_x - MARGIN
        y = max_y // 2 if self._focused else MARGIN if "top" in place else max_y - MARGIN
        events = X.ExposureMask | X.ButtonPressMask | X.FocusChangeMask
        self._window = screen.root.create_window(
            x, y, width, height, 1, screen.root_depth, background_pixel=0xF6E7B4, event_mask=events
        )
        self._ink = self._window.create_gc(foreground=0x202020, font=self._display.open_font("fixed"))
        self._set_properties(title, x, y, width, height)

    def show(self) -> None:
        """Map the window; return once it is drawn and, at the place `center`, has the focus."""
        self._window.map()
        self._await(X.Expose)
        if self._focused:
            data = (32, [2, X.CurrentTime, 0, 0, 0])
            event = ClientMessage(window=self._window, client_type=self._atom("_NET_ACTIVE_WINDOW"), data=data)
            root = self._display.screen().root
            root.send_event(event, event_mask=X.SubstructureRedirectMask | X.SubstructureNotifyMask)
            self._await(X.FocusIn)

    def serve(self) -> None:
        """Handle events until the window is closed."""
        while not self._handle(self._display.next_event()):
            pass

    def _set_properties(self, title: str, x: int, y: int, width: int, height: int) -> None:
        window, atom = self._window, self._atom
        window.set_wm_name(title)
        window.set_wm_class("noise", "Noise")
        window.set_wm_protocols([atom("WM_DELETE_WINDOW")])
        fixed = Xutil.USPosition | Xutil.USSize | Xutil.PMinSize | Xutil.PMaxSize
        sizes = {"min_width": width, "max_width": width, "min_height": height, "max_height": height}
        window.set_wm_normal_hints(flags=fixed, x=x, y=y, width=width, height=height, **sizes)
        window.set_wm_hints(flags=Xutil.InputHint, input=int(self._focused))
        if not self._focused:
            states = [atom(f"_NET_WM_STATE_{name}") for name in ("ABOVE", "SKIP_TASKBAR", "SKIP_PAGER")]
            window.change_property(atom("_NET_WM_STATE"), Xatom.ATOM, 32, states)
            window.change_property(atom("_MOTIF_WM_HINTS"), atom("_MOTIF_WM_HINTS"), 32, FRAMELESS)

    def _atom(self, name: str) -> Any:
        return self._display.intern_atom(name)

    def _await(self, kind: int) -> None:
        deadline = time.monotonic() + SHOW_TIMEOUT_S
        while time.monotonic() < deadline:
            while self._display.pending_events():
                event = self._display.next_event()
                self._handle(event)
                if event.type == kind:
                    self._display.sync()
                    return
            time.sleep(0.005)
        raise TimeoutError("the window did not become visible")

    def _handle(self, event: Any) -> bool:
        """Draw the window if necessary; return whether the event closes it."""
        if event.type == X.Expose:
            for number, line in enumerate(self._lines):
                self._window.draw_text(self._ink, 16, 28 + LINE_HEIGHT * number, line.encode())
        clicked = self._focused and event.type == X.ButtonPress
        return bool(clicked or event.type == X.ClientMessage)


def main() -> None:
    """Show the window from a background process; exit once it is visible."""
    shown, show = os.pipe()
    if os.fork():
        os.close(show)
        sys.exit(0 if os.read(shown, 1) else 1)
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):  # the caller waits until all copies of its output pipe are closed
        os.dup2(null, stream)
    window = NoiseWindow(**json.loads(sys.argv[1]))
    window.show()
    os.write(show, b"1")
    os.close(show)
    window.serve()


if __name__ == "__main__":
    main()
