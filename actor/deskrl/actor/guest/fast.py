"""The fast path: deskrl's own routes, for a client that keeps its pauses to itself. Knows no OSWorld.

Screenshots are raw pixels (BGRX, row by row), the size in the headers X-Width and X-Height.
"""

from __future__ import annotations

import os
import subprocess

from deskrl.actor.guest.commands import Commands, NoApplication
from deskrl.actor.guest.desk import Desk
from deskrl.actor.guest.http import Request, Response, Routes, json_response


def fast_routes(desk: Desk, commands: Commands) -> Routes:
    """Routes over one desktop; the host's end of each is a method of `GuestDesktop`."""

    def pixels(data: bytes) -> Response:
        size = {"X-Width": str(desk.screen.width), "X-Height": str(desk.screen.height)}
        return Response(data, headers=size)

    def settle(request: Request) -> Response:
        rule = request.json()
        return pixels(desk.screen.settle(float(rule["quiet_s"]), float(rule["limit_s"])))

    def act(request: Request) -> Response:
        desk.hands.act(request.json())
        return json_response({})

    def execute(request: Request) -> Response:
        data = request.json()
        timeout_s = float(data["timeout_s"])
        try:
            done = commands.run(data["command"], shell=bool(data["shell"]), timeout_s=timeout_s)
        except subprocess.TimeoutExpired:
            return json_response({"error": f"not over after {timeout_s:g} s"}, 408)
        except OSError as error:  # no such program, or no room for another process: the shell's own exit statuses
            return json_response({"returncode": 126 + isinstance(error, FileNotFoundError), "error": str(error)})
        return json_response({"returncode": done.returncode, "output": done.stdout, "error": done.stderr})

    def launch(request: Request) -> Response:
        data = request.json()
        try:
            commands.launch(data["command"], shell=bool(data["shell"]))
        except OSError as error:
            return json_response({"error": str(error)}, 422)
        return json_response({})

    def write_file(request: Request) -> Response:
        path = commands.expand(request.query["path"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(request.body)
        return json_response({})

    def read_file(request: Request) -> Response:
        path = commands.expand(request.query["path"])
        if not (os.access(path, os.R_OK) and path.is_file()):  # made unreadable is the policy's doing, as is removed
            return json_response({"error": "no such file"}, 404)
        return Response(path.read_bytes())

    def open_path(request: Request) -> Response:
        data = request.json()
        path = commands.expand(data["path"])
        if not path.exists():
            return json_response({"error": f"{path}: no such file"}, 422)
        try:
            opened = desk.open_path(path, float(data["timeout_s"]))
        except NoApplication as error:
            return json_response({"error": str(error)}, 422)
        return json_response({}) if opened else json_response({"error": f"no window came for {path}"}, 408)

    def wait_for_window(request: Request) -> Response:
        data = request.json()
        window = desk.windows.wait_for(data["name"], float(data["timeout_s"]))
        return json_response({}) if window is not None else json_response({"error": "no such window"}, 408)

    return {
        ("GET", "/deskrl/health"): lambda _: json_response({}),
        ("GET", "/deskrl/screenshot"): lambda _: pixels(desk.screen.grab()),
        ("POST", "/deskrl/settle"): settle,
        ("POST", "/deskrl/act"): act,
        ("POST", "/deskrl/execute"): execute,
        ("POST", "/deskrl/launch"): launch,
        ("POST", "/deskrl/write_file"): write_file,
        ("POST", "/deskrl/read_file"): read_file,
        ("POST", "/deskrl/open_path"): open_path,
        ("POST", "/deskrl/wait_for_window"): wait_for_window,
        ("GET", "/deskrl/windows"): lambda _: json_response([window.record() for window in desk.windows.list()]),
    }
