"""The guest server's entry: brings the session up, then answers on the socket that it was handed.

Run inside the sandbox as `python -m deskrl.actor.guest.server OPTIONS`, its options a JSON object: `listener` (the
descriptor of a listening socket), `door` (the path of a socket through which that comes) or `port` (to listen on),
`width`, `height`, and `max_processes` and `max_data_bytes`, null where a control group of the host sees to them. Its
end ends the sandbox.
"""

from __future__ import annotations

import json
import socket
import sys
from typing import Any

from Xlib.display import Display

from deskrl.actor.guest.commands import Commands
from deskrl.actor.guest.desk import Desk
from deskrl.actor.guest.fast import fast_routes
from deskrl.actor.guest.hands import Hands
from deskrl.actor.guest.http import Server
from deskrl.actor.guest.keyring import leave_keyring
from deskrl.actor.guest.osworld import osworld_routes
from deskrl.actor.guest.screen import Screen
from deskrl.actor.guest.session import DISPLAY, Limits, Session
from deskrl.actor.guest.system_calls import filter_system_calls
from deskrl.actor.guest.windows import Windows

_BACKGROUND = 0x2E5266


def main() -> None:
    """Start everything, serve for ever."""
    options = json.loads(sys.argv[1])
    leave_keyring()
    filter_system_calls()
    limits = Limits(options["max_processes"], options["max_data_bytes"])
    session = Session(options["width"], options["height"], limits)
    framebuffer = session.wait_for_x_server()
    session.start_window_manager()
    display = Display(DISPLAY)
    paint_background(display)
    windows = Windows(display)
    while not windows.manager_answers():
        session.check_window_manager()
    commands = Commands(session.environment)
    screen = Screen(framebuffer)
    desk = Desk(screen, Hands(Display(DISPLAY), screen.width, screen.height), windows, commands)
    routes = {**osworld_routes(desk, commands), **fast_routes(desk, commands)}
    Server(_listener(options), routes).serve_forever()


def _listener(options: dict[str, Any]) -> socket.socket:
    if "door" in options:
        with socket.socket(socket.AF_UNIX) as door:
            door.connect(options["door"])
            _, (descriptor,), _, _ = socket.recv_fds(door, 1, 1)
        return socket.socket(fileno=descriptor)
    if "port" in options:
        return socket.create_server(("", options["port"]), backlog=64)
    return socket.socket(fileno=options["listener"])


def paint_background(display: Display) -> None:
    """Colour the root window."""
    root = display.screen().root
    root.change_attributes(background_pixel=_BACKGROUND)
    root.clear_area()
    display.sync()


if __name__ == "__main__":
    main()
