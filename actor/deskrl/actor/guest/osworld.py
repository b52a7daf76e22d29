"""OSWorld's guest protocol: the routes that its client and evaluators use. Knows the protocol, holds no state.

Left out, answered with 404: recordings, accessibility trees, wallpapers. `/terminal` answers as OSWorld's server does
where no GNOME terminal runs. Actions of OSWorld's client are `python -c "import pyautogui; …"`: for the desktop's
interpreter called `python` that module is `guest/pyautogui.py`.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deskrl.actor.guest.commands import Commands, NoApplication
from deskrl.actor.guest.desk import Desk
from deskrl.actor.guest.http import BadRequest, Request, Response, Routes, json_response, text_response

_EXECUTE_TIMEOUT_S = 120.0
_PYTHON_TIMEOUT_S = 30.0
_OPEN_TIMEOUT_S = 1800.0


def osworld_routes(desk: Desk, commands: Commands) -> Routes:
    """The protocol's routes over one desktop."""
    files = _Files(commands)
    run = _Run(commands)
    windows = _Windows(desk, commands)

    def screenshot(_: Request) -> Response:
        return Response(desk.encode_png(desk.screen.grab()), content_type="image/png")

    def screen_size(_: Request) -> Response:
        return json_response({"width": desk.screen.width, "height": desk.screen.height})

    return {
        ("GET", "/screenshot"): screenshot,
        ("POST", "/screen_size"): screen_size,
        ("GET", "/cursor_position"): lambda _: json_response(list(desk.hands.position())),
        ("GET", "/platform"): lambda _: text_response(platform.system()),
        ("GET", "/terminal"): lambda _: json_response({"output": None, "status": "success"}),
        ("POST", "/desktop_path"): lambda _: json_response({"desktop_path": str(commands.expand("~/Desktop"))}),
        ("POST", "/execute"): run.execute,
        ("POST", "/setup/execute"): run.execute,
        ("POST", "/setup/launch"): run.launch,
        ("POST", "/run_python"): run.python,
        ("POST", "/run_bash_script"): run.bash_script,
        ("POST", "/file"): files.download,
        ("POST", "/setup/upload"): files.upload,
        ("POST", "/list_directory"): files.tree,
        ("POST", "/window_size"): windows.size,
        ("POST", "/setup/open_file"): windows.open_file,
        ("POST", "/setup/activate_window"): windows.activate,
        ("POST", "/setup/close_window"): windows.close,
    }


class _Run:
    def __init__(self, commands: Commands) -> None:
        self._commands = commands

    def execute(self, request: Request) -> Response:
        data = request.json()
        shell = bool(data.get("shell", False))
        try:
            done = self._commands.run(data.get("command", []), shell=shell, timeout_s=_EXECUTE_TIMEOUT_S)
        except (OSError, ValueError, IndexError, subprocess.TimeoutExpired) as error:
            return json_response({"status": "error", "message": str(error)}, 500)
        return json_response(
            {"status": "success", "output": done.stdout, "error": done.stderr, "returncode": done.returncode}
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
        command = ["/bin/bash", "-c", 'cd "$0" && eval "$1"', str(folder), str(data.get("script", ""))]
        return self._script(command, float(data.get("timeout", 100)), {}, returncode_name="returncode")

    def _script(
        self, command: list[str], timeout_s: float, extra: Mapping[str, Any], *, returncode_name: str
    ) -> Response:
        try:
            done = self._commands.run(command, shell=False, timeout_s=timeout_s)
        except subprocess.TimeoutExpired:
            message = f"timed out after {timeout_s:g} s"
            return json_response({"status": "error", "message": message, "output": "", "error": message, **extra}, 500)
        record = {"status": "success" if done.returncode == 0 else "error", "output": done.stdout, **extra}
        return json_response(record | {"message": done.stdout, "error": done.stderr, returncode_name: done.returncode})


class _Files:
    def __init__(self, commands: Commands) -> None:
        self._commands = commands

    def download(self, request: Request) -> Response:
        fields = request.form()
        if "file_path" not in fields:
            return json_response({"error": "file_path is required"}, 400)
        path = self._commands.expand(fields["file_path"].decode())
        if not path.is_file():
            return json_response({"error": "File not found"}, 404)
        return Response(path.read_bytes())

    def upload(self, request: Request) -> Response:
        fields = request.form()
        if "file_path" not in fields or "file_data" not in fields:
            return json_response({"error": "file_path and file_data are required"}, 400)
        path = self._commands.expand(fields["file_path"].decode())
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(fields["file_data"])
        return text_response(f"File Uploaded: {len(fields['file_data'])} bytes")

    def tree(self, request: Request) -> Response:
        path = self._commands.expand(str(request.json().get("path", "")))
        if not path.is_dir():
            return json_response({"error": f"{path} is no directory"}, 400)
        return json_response({"directory_tree": _tree(path)})


class _Windows:
    def __init__(self, desk: Desk, commands: Commands) -> None:
        self._desk = desk
        self._commands = commands

    def size(self, request: Request) -> Response:
        fields = request.form()
        if "app_class_name" not in fields:
            return json_response({"error": "app_class_name is required"}, 400)
        window = self._desk.windows.find(fields["app_class_name"].decode(), by_class=True)
        if window is None:
            return json_response({"error": "no such window"}, 500)
        return json_response({"width": window.width, "height": window.height})

    def open_file(self, request: Request) -> Response:
        path = self._commands.expand(str(request.json().get("path") or _missing("path")))
        if not path.exists():
            return text_response(f"{path} not found", 404)
        try:
            opened = self._desk.open_path(path, _OPEN_TIMEOUT_S)
        except NoApplication as error:
            return text_response(str(error), 500)
        return text_response("File opened successfully") if opened else text_response("no window came", 500)

    def activate(self, request: Request) -> Response:
        window = self._find(request)
        if window is not None:
            self._desk.windows.activate(window)
        return text_response("Window activated successfully")  # also without such a window, as wmctrl has it

    def close(self, request: Request) -> Response:
        window = self._find(request)
        if window is not None:
            self._desk.windows.close(window)
        return text_response("Window closed successfully.")

    def _find(self, request: Request) -> Any:
        data = request.json()
        name = data.get("window_name") or _missing("window_name")
        strict, by_class = bool(data.get("strict")), bool(data.get("by_class"))
        return self._desk.windows.find(name, strict=strict, by_class=by_class)


def _missing(name: str) -> str:
    raise BadRequest(f"{name} required")


def _tree(path: Path) -> dict[str, Any]:
    if path.is_dir() and not path.is_symlink():
        return {"type": "directory", "name": path.name, "children": [_tree(child) for child in sorted(path.iterdir())]}
    return {"type": "file", "name": path.name}
