"""Server loop of the guest server: everything that needs the X server and the routes."""

from __future__ import annotations

import socket
from typing import Any

from deskrl.actor.guest.command_runner import CommandRunner
from deskrl.actor.guest.desktop_facade import BACKGROUND_COLOUR, DesktopFacade, ReconnectingInput
from deskrl.actor.guest.framebuffer import Framebuffer
from deskrl.actor.guest.guest_http import HttpServer
from deskrl.actor.guest.native_routes import native_routes
from deskrl.actor.guest.osworld_routes import osworld_routes
from deskrl.actor.guest.session import DISPLAY, FRAMEBUFFER_FILE, Session
from deskrl.actor.guest.windows import Windows, paint_background
from deskrl.actor.guest.x_connection import XConnection


def serve(session: Session, options: dict[str, Any]) -> None:
    """Serve requests forever.

    Args:
        session: session whose programs have been started.
        options: options of the guest server.
    """
    connection = XConnection(DISPLAY)
    connection.call(lambda display: paint_background(display, BACKGROUND_COLOUR))
    windows = Windows(connection)
    while not windows.is_manager_ready():
        session.check_window_manager()
    commands = CommandRunner(session)
    framebuffer = Framebuffer(FRAMEBUFFER_FILE)
    input_device = ReconnectingInput(XConnection(DISPLAY), framebuffer.width, framebuffer.height)
    desktop = DesktopFacade(framebuffer, input_device, windows, commands, session)
    routes = {**osworld_routes(desktop, commands), **native_routes(desktop, commands)}
    HttpServer(_listener(options), routes).serve_forever()


def _listener(options: dict[str, Any]) -> socket.socket:
    if "handoff_socket" in options:
        with socket.socket(socket.AF_UNIX) as handoff:
            handoff.connect(options["handoff_socket"])
            _, (descriptor,), _, _ = socket.recv_fds(handoff, 1, 1)
        return socket.socket(fileno=descriptor)
    if "port" in options:
        return socket.create_server(("", options["port"]), backlog=64)
    return socket.socket(fileno=options["listener"])
