"""Routes of OSWorld's guest protocol that its client and evaluators use.

Recordings, accessibility trees and wallpapers are not implemented (status 404). `/terminal` responds like OSWorld's
server without a running GNOME terminal. OSWorld's client sends actions as `python -c "import pyautogui; ..."`; for the
desktop's interpreter called `python`, that module is `guest/pyautogui.py`.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from typing import Any

from deskrl.actor.guest.command_runner import CommandRunner, NoDefaultApplication
from deskrl.actor.guest.desktop_facade import DesktopFacade
from deskrl.actor.guest.guest_files import GuestFiles
from deskrl.actor.guest.guest_http import BadRequest, Request, Response, Routes, json_response, text_response

_EXECUTE_TIMEOUT_S = 120.0
_PYTHON_TIMEOUT_S = 30.0
_OPEN_TIMEOUT_S = 1800.0


def osworld_routes(desktop: DesktopFacade, commands: CommandRunner) -> Routes:
    """Return the routes of OSWorld's protocol for one desktop."""
    files = _FileRoutes(commands, desktop.session.files)
    run = _CommandRoutes(commands)
    windows = _WindowRoutes(desktop, commands)

    def screenshot(_: Request) -> Response:
        return Response(desktop.encode_png(desktop.framebuffer.grab()), content_type="image/png")

    def screen_size(_: Request) -> Response:
        return json_response({"width": desktop.framebuffer.width, "height": desktop.framebuffer.height})

    return {
        ("GET", "/screenshot"): screenshot,
        ("POST", "/screen_size"): screen_size,
        ("GET", "/cursor_position"): lambda _: json_response(list(desktop.input_device.position())),
        ("GET", "/platform"): lambda _: text_response(os.uname().sysname),
        ("GET", "/terminal"): lambda _: json_response({"output": None, "status": "success"}),
        ("POST", "/desktop_path"): lambda _: json_response({"desktop_path": commands.expand("~/Desktop")}),
        ("POST", "/execute"): run.execute,
        ("POST", "/setup/execute"): run.execute,
        ("POST", "/setup/launch"): run.launch,
        ("POST", "/run_python"): run.python,
        ("POST", "/run_bash_script"): run.bash_script,
        ("POST", "/file"): files.download,
        ("POST", "/setup/upload"): files.upload,
        ("POST", "/list_directory"): files.list_directory,
        ("POST", "/window_size"): windows.size,
        ("POST", "/setup/open_file"): windows.open_file,
        ("POST", "/setup/activate_window"): windows.activate,
        ("POST", "/setup/close_window"): windows.close,
    }


class _CommandRoutes:
    def __init__(self, commands: CommandRunner) -> None:
        self._commands = commands

    def execute(self, request: Request) -> Response:
        data = request.json()
        shell = bool(data.get("shell", False))
        try:
            result = self._commands.run(data.get("command", []), shell=shell, timeout_s=_EXECUTE_TIMEOUT_S)
        except (OSError, ValueError, IndexError, subprocess.TimeoutExpired) as error:
            return json_response({"status": "error", "message": str(error)}, 500)
        return json_response(
            {"status": "success", "output": result.stdout, "error": result.stderr, "returncode": result.returncode}
        )

    def launch(self, request: Request) -> Response:
        data = request.json()
        command = data.get("command", [])
        try:
            self._commands.launch(command, shell=bool(data.get("shell", False)))
        except (OSError, ValueError, IndexError) as error:
            return json_response({"status": "error", "message": str(error)}, 500)
        line = command if isinstance(command, str) else " ".join(command)
        return text_response(f"{line} launched successfully")

    def python(self, request: Request) -> Response:
        command = ["/usr/bin/python3", "-c", str(request.json().get("code", ""))]
        return self._script(command, _PYTHON_TIMEOUT_S, {"need_more": False}, returncode_name="return_code")

    def bash_script(self, request: Request) -> Response:
        data = request.json()
        folder = self._commands.expand(str(data.get("working_dir") or "~"))
        command = ["/bin/bash", "-c", 'cd "$0" && eval "$1"', folder, str(data.get("script", ""))]
        return self._script(command, float(data.get("timeout", 100)), {}, returncode_name="returncode")

    def _script(
        self, command: list[str], timeout_s: float, extra: Mapping[str, Any], *, returncode_name: str
    ) -> Response:
        try:
            result = self._commands.run(command, shell=False, timeout_s=timeout_s)
        except subprocess.TimeoutExpired:
            message = f"timed out after {timeout_s:g} s"
            return json_response({"status": "error", "message": message, "output": "", "error": message, **extra}, 500)
        record = {"status": "success" if result.returncode == 0 else "error", "output": result.stdout, **extra}
        return json_response(
            record | {"message": result.stdout, "error": result.stderr, returncode_name: result.returncode}
        )


class _FileRoutes:
    def __init__(self, commands: CommandRunner, files: GuestFiles) -> None:
        self._commands = commands
        self._files = files

    def download(self, request: Request) -> Response:
        fields = request.form()
        if "file_path" not in fields:
            return json_response({"error": "file_path is required"}, 400)
        path = self._commands.expand(fields["file_path"].decode())
        try:
            return Response(self._files.read(path))
        except FileNotFoundError:
            return json_response({"error": "File not found"}, 404)

    def upload(self, request: Request) -> Response:
        fields = request.form()
        if "file_path" not in fields or "file_data" not in fields:
            return json_response({"error": "file_path and file_data are required"}, 400)
        path = self._commands.expand(fields["file_path"].decode())
        self._files.write(path, fields["file_data"])
        return text_response(f"File Uploaded: {len(fields['file_data'])} bytes")

    def list_directory(self, request: Request) -> Response:
        path = self._commands.expand(str(request.json().get("path", "")))
        try:
            return json_response({"directory_tree": self._files.tree(path)})
        except FileNotFoundError:
            return json_response({"error": f"{path} is not a directory"}, 400)


class _WindowRoutes:
    def __init__(self, desktop: DesktopFacade, commands: CommandRunner) -> None:
        self._desktop = desktop
        self._commands = commands

    def size(self, request: Request) -> Response:
        fields = request.form()
        if "app_class_name" not in fields:
            return json_response({"error": "app_class_name is required"}, 400)
        window = self._desktop.windows.find(fields["app_class_name"].decode(), by_class=True)
        if window is None:
            return json_response({"error": "window not found"}, 500)
        return json_response({"width": window.width, "height": window.height})

    def open_file(self, request: Request) -> Response:
        path = self._commands.expand(str(request.json().get("path") or _missing("path")))
        if not self._desktop.session.files.exists(path):
            return text_response(f"{path} not found", 404)
        try:
            opened = self._desktop.open_path(path, _OPEN_TIMEOUT_S)
        except NoDefaultApplication as error:
            return text_response(str(error), 500)
        return text_response("File opened successfully") if opened else text_response("no window opened", 500)

    def activate(self, request: Request) -> Response:
        window = self._find(request)
        if window is not None:
            self._desktop.windows.activate(window)
        return text_response("Window activated successfully")  # also if there is no such window, as with wmctrl

    def close(self, request: Request) -> Response:
        window = self._find(request)
        if window is not None:
            self._desktop.windows.close(window)
        return text_response("Window closed successfully.")

    def _find(self, request: Request) -> Any:
        data = request.json()
        name = data.get("window_name") or _missing("window_name")
        strict, by_class = bool(data.get("strict")), bool(data.get("by_class"))
        return self._desktop.windows.find(name, strict=strict, by_class=by_class)


def _missing(name: str) -> str:
    raise BadRequest(f"{name} is required")
