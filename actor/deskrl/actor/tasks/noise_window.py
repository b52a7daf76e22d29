"""A window that is noise: a note kept above a corner of the screen, or a message that holds the focus.

This module's source goes into noisy task files, whose setup runs it on the desktop: it may use nothing but the
interpreter's library and Xlib, which OSWorld's desktop has too. Its one argument is JSON: {"title", "lines", "place"}.
The place `center` has the focus and goes when it is closed or clicked; any other, as `top-right`, never has the focus
and stays. The program ends, successfully, once the window is shown.
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
FOCUS_WITHIN_S = 10.0
FRAMELESS = [2, 0, 0, 0, 0]  # of _MOTIF_WM_HINTS: decorations are stated, and none


class Noise:
    """One such window."""

    def __init__(self, title: str, lines: list[str], place: str) -> None:
        self._display = Display()
        self._lines = lines
        self._focused = place == "center"
        screen = self._display.screen()
        width, height = MESSAGE_SIZE if self._focused else NOTE_SIZE
        room_x, room_y = screen.width_in_pixels - width, screen.height_in_pixels - height
        x = room_x // 2 if self._focused else MARGIN if "left" in place else room_x - MARGIN
        y = room_y // 2 if self._focused else MARGIN if "top" in place else room_y - MARGIN
        events = X.ExposureMask | X.ButtonPressMask | X.FocusChangeMask
        self._window = screen.root.create_window(
            x, y, width, height, 1, screen.root_depth, background_pixel=0xF6E7B4, event_mask=events
        )
        self._ink = self._window.create_gc(foreground=0x202020, font=self._display.open_font("fixed"))
        self._describe(title, x, y, width, height)

    def show(self) -> None:
        """Map it, and return once it is drawn, and has the focus if it is to have it."""
        self._window.map()
        self._await(X.Expose)
        if self._focused:
            data = (32, [2, X.CurrentTime, 0, 0, 0])
            event = ClientMessage(window=self._window, client_type=self._atom("_NET_ACTIVE_WINDOW"), data=data)
            root = self._display.screen().root
            root.send_event(event, event_mask=X.SubstructureRedirectMask | X.SubstructureNotifyMask)
            self._await(X.FocusIn)

    def serve(self) -> None:
        """Draw until it is closed."""
        while not self._ends(self._display.next_event()):
            pass

    def _describe(self, title: str, x: int, y: int, width: int, height: int) -> None:
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
        deadline = time.monotonic() + FOCUS_WITHIN_S
        while time.monotonic() < deadline:
            while self._display.pending_events():
                event = self._display.next_event()
                self._ends(event)
                if event.type == kind:
                    self._display.sync()
                    return
            time.sleep(0.005)
        raise TimeoutError("the window is not shown")

    def _ends(self, event: Any) -> bool:
        if event.type == X.Expose:
            for number, line in enumerate(self._lines):
                self._window.draw_text(self._ink, 16, 28 + LINE_HEIGHT * number, line.encode())
        clicked = self._focused and event.type == X.ButtonPress
        return bool(clicked or event.type == X.ClientMessage)


def main() -> None:
    """Show the window in a process of its own."""
    shown, show = os.pipe()
    if os.fork():
        os.close(show)
        sys.exit(0 if os.read(shown, 1) else 1)
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):  # whoever runs the command waits until nobody holds its output
        os.dup2(nothing, stream)
    noise = Noise(**json.loads(sys.argv[1]))
    noise.show()
    os.write(show, b"1")
    os.close(show)
    noise.serve()


if __name__ == "__main__":
    main()
