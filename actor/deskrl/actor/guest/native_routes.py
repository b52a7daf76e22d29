"""Native routes of the guest server: deskrl's own protocol, in which every desktop operation is one request.

Screenshots are raw pixels (BGRX, row by row); the headers X-Width and X-Height give the size, and X-Frame the id of the
frame. A client that sends the id of the frame that it has gets the changed rows only, if that frame is the last one
that was sent: then X-Rows gives their ranges.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable

from deskrl.actor.guest.command_runner import CommandRunner, NoDefaultApplication
from deskrl.actor.guest.controlled_browser import BrowserError, ControlledBrowser
from deskrl.actor.guest.desktop_facade import BACKGROUND_COLOUR, DesktopFacade
from deskrl.actor.guest.frame_changes import FrameSender, format_rows
from deskrl.actor.guest.guest_http import Handler, Request, Response, Routes, json_response


def native_routes(desktop: DesktopFacade, commands: CommandRunner) -> Routes:
    """Return the native routes of one desktop. `GuestDesktop` is the client of these routes."""
    return {
        ("GET", "/deskrl/health"): lambda _: json_response({}),
        **_episode_routes(desktop),
        **_screen_routes(desktop),
        **_command_routes(commands),
        **_file_routes(desktop, commands),
        **_window_routes(desktop, commands),
        **_browser_routes(ControlledBrowser(desktop.session)),
    }


def _episode_routes(desktop: DesktopFacade) -> Routes:
    """Return the routes that separate setup, episode and evaluation."""

    def action(operation: Callable[[], None]) -> Handler:
        def call(_: Request) -> Response:
            operation()
            return json_response({})

        return call

    return {
        ("POST", "/deskrl/allow_terminal"): action(desktop.allow_terminal),
        ("POST", "/deskrl/end_setup"): action(desktop.session.end_setup),
        ("POST", "/deskrl/stop_policy_programs"): action(desktop.stop_policy_programs),
        ("POST", "/deskrl/stop_all_programs"): action(desktop.session.stop_all_programs),
        ("POST", "/deskrl/redraw"): action(lambda: desktop.windows.repaint(BACKGROUND_COLOUR)),
    }


def _screen_routes(desktop: DesktopFacade) -> Routes:
    """Return the routes of screen and input."""

    screen = desktop.framebuffer
    sender = FrameSender(4 * screen.width)

    def reply(pixels: bytes, known_frame_id: str) -> Response:
        frame = sender.reply(pixels, known_frame_id)
        headers = {"X-Width": str(screen.width), "X-Height": str(screen.height), "X-Frame": frame.frame_id}
        if frame.rows is not None:
            headers["X-Rows"] = format_rows(frame.rows)
        return Response(frame.data, headers=headers)

    def screenshot(request: Request) -> Response:
        return reply(screen.grab(), request.query.get("known_frame", ""))

    def settle(request: Request) -> Response:
        data = request.json()
        return reply(screen.settle(float(data["quiet_s"]), float(data["limit_s"])), str(data.get("known_frame", "")))

    def act(request: Request) -> Response:
        desktop.input_device.act(request.json())
        return json_response({})

    return {
        ("GET", "/deskrl/screenshot"): screenshot,
        ("POST", "/deskrl/settle"): settle,
        ("POST", "/deskrl/act"): act,
    }


def _command_routes(commands: CommandRunner) -> Routes:
    """Return the routes that run programs."""

    def execute(request: Request) -> Response:
        data = request.json()
        timeout_s = float(data["timeout_s"])
        try:
            result = commands.run(data["command"], shell=bool(data["shell"]), timeout_s=timeout_s)
        except subprocess.TimeoutExpired:
            return json_response({"error": f"the command did not finish within {timeout_s:g} s"}, 408)
        except OSError as error:  # exit statuses of the shell: 127 not found, 126 cannot be started
            return json_response({"returncode": 126 + isinstance(error, FileNotFoundError), "error": str(error)})
        return json_response({"returncode": result.returncode, "output": result.stdout, "error": result.stderr})

    def launch(request: Request) -> Response:
        data = request.json()
        try:
            commands.launch(data["command"], shell=bool(data["shell"]))
        except OSError as error:
            return json_response({"error": str(error)}, 422)
        return json_response({})

    return {("POST", "/deskrl/execute"): execute, ("POST", "/deskrl/launch"): launch}


def _file_routes(desktop: DesktopFacade, commands: CommandRunner) -> Routes:
    """Return the routes that read and write files of the session."""

    def write_file(request: Request) -> Response:
        desktop.session.files.write(commands.expand(request.query.get("path", "")), request.body)
        return json_response({})

    def read_file(request: Request) -> Response:
        try:
            return Response(desktop.session.files.read(commands.expand(request.query.get("path", ""))))
        except FileNotFoundError as error:
            return json_response({"error": str(error)}, 404)

    return {("POST", "/deskrl/write_file"): write_file, ("POST", "/deskrl/read_file"): read_file}


def _window_routes(desktop: DesktopFacade, commands: CommandRunner) -> Routes:
    """Return the routes that open and list windows."""

    def open_path(request: Request) -> Response:
        data = request.json()
        path = commands.expand(data["path"])
        if not desktop.session.files.exists(path):
            return json_response({"error": f"{path}: not found"}, 422)
        try:
            opened = desktop.open_path(path, float(data["timeout_s"]))
        except NoDefaultApplication as error:
            return json_response({"error": str(error)}, 422)
        return json_response({}) if opened else json_response({"error": f"no window opened for {path}"}, 408)

    def wait_for_window(request: Request) -> Response:
        data = request.json()
        name, timeout_s = data["name"], float(data["timeout_s"])
        if desktop.windows.wait_for(name, timeout_s) is None:
            return json_response({"error": f"no window named {name} within {timeout_s:g} s"}, 408)
        return json_response({})

    return {
        ("POST", "/deskrl/open_path"): open_path,
        ("POST", "/deskrl/wait_for_window"): wait_for_window,
        ("GET", "/deskrl/windows"): lambda _: json_response(desktop.window_records()),
    }


def _browser_routes(browser: ControlledBrowser) -> Routes:
    """Return the routes that start and control a browser."""

    def start(request: Request) -> Response:
        data = request.json()
        try:
            browser.start(data["command"], data["events"])
        except (OSError, BrowserError) as error:
            return json_response({"error": str(error)}, 422)
        return json_response({})

    def call(request: Request) -> Response:
        data = request.json()
        timeout_s = float(data["timeout_s"])
        try:
            result = browser.call(data["method"], data["parameters"], data["session_id"], timeout_s)
        except BrowserError as error:
            return json_response({"error": str(error)}, 422)
        return json_response(result)

    return {
        ("POST", "/deskrl/start_browser"): start,
        ("POST", "/deskrl/call_browser"): call,
        ("GET", "/deskrl/browser_events"): lambda _: json_response(browser.events()),
    }
