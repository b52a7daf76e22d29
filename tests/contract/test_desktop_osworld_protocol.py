"""The guest server implements OSWorld's routes as OSWorld's client and evaluators expect."""

import asyncio
import http.client
import io
import json
import socket
import tempfile
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deskrl.actor.desktops.debian_packages import missing_packages
from deskrl.actor.desktops.embedded import EmbeddedDesktop
from deskrl.core.config import DesktopConfig

pytestmark = pytest.mark.skipif(bool(missing_packages()), reason=f"packages missing: {missing_packages()}")


class Guest:
    """Client of the protocol over the desktop's Unix socket instead of TCP port 5000."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def send(self, method: str, route: str, body: bytes | None = None, content_type: str = "") -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("desktop", timeout=60)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(self._path))
        try:
            connection.request(method, route, body, {"Content-Type": content_type} if content_type else {})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def post_json(self, route: str, **fields: Any) -> tuple[int, Any]:
        status, body = self.send("POST", route, json.dumps(fields).encode(), "application/json")
        try:
            return status, json.loads(body)
        except ValueError:
            return status, body.decode()

    def post_form(self, route: str, **fields: str) -> tuple[int, bytes]:
        return self.send("POST", route, urllib.parse.urlencode(fields).encode(), "application/x-www-form-urlencoded")


@pytest.fixture(scope="module")
def guest() -> Iterator[Guest]:
    with tempfile.TemporaryDirectory(prefix="deskrl-test-") as folder, asyncio.Runner() as runner:
        desktop = EmbeddedDesktop(DesktopConfig(width=640, height=480), "guest", Path(folder) / "desktops")
        try:
            runner.run(desktop.start())
            yield Guest(desktop.socket_path)
        finally:
            runner.run(desktop.close())


def test_a_screenshot_is_a_png_of_the_screen(guest: Guest) -> None:
    status, body = guest.send("GET", "/screenshot")
    assert status == 200
    image = Image.open(io.BytesIO(body))
    assert (image.format, image.size) == ("PNG", (640, 480))


@pytest.mark.parametrize("route", ["/execute", "/setup/execute"])
def test_execute_accepts_a_list_of_words_and_a_shell_command(guest: Guest, route: str) -> None:
    for command, shell in (["echo", "a b"], False), ("echo 'a b'", False), ("echo 'a b' | cat", True):
        expected = {"status": "success", "output": "a b\n", "error": "", "returncode": 0}
        assert guest.post_json(route, command=command, shell=shell) == (200, expected)


def test_a_failing_command_has_status_200_and_a_missing_program_has_status_500(guest: Guest) -> None:
    status, done = guest.post_json("/execute", command=["false"])
    assert (status, done["status"], done["returncode"]) == (200, "success", 1)
    status, done = guest.post_json("/execute", command=["no-such-program"])
    assert (status, done["status"]) == (500, "error") and "no-such-program" in done["message"]


def test_evaluators_find_python_on_the_path(guest: Guest) -> None:
    status, done = guest.post_json("/execute", command=["python", "-c", "import os; print(os.path.expanduser('~'))"])
    assert (status, done["output"]) == (200, "/home/user\n")


def test_a_window_can_be_opened_measured_activated_and_closed(guest: Guest) -> None:
    status, text = guest.post_json("/setup/launch", command=["xterm", "-T", "Some title"])
    assert (status, text) == (200, "xterm -T Some title launched successfully")
    status, body = guest.post_form("/window_size", app_class_name="xterm")
    while status != 200:  # launch does not wait for the window
        status, body = guest.post_form("/window_size", app_class_name="xterm")
    assert set(json.loads(body)) == {"width", "height"}
    assert guest.post_json("/setup/activate_window", window_name="some TITLE")[0] == 200
    assert guest.post_json("/setup/close_window", window_name="Some title", strict=True)[0] == 200
    while guest.post_form("/window_size", app_class_name="xterm")[0] == 200:
        pass
    assert guest.post_json("/setup/activate_window")[0] == 400


def test_a_file_can_be_uploaded_listed_opened_and_downloaded(guest: Guest) -> None:
    data = b"one\r\ntwo\r\n\r\n--three"
    parts = [
        b'--XX\r\nContent-Disposition: form-data; name="file_path"\r\n\r\n~/new/some file.txt\r\n',
        b'--XX\r\nContent-Disposition: form-data; name="file_data"; filename="x"\r\n'
        b"Content-Type: application/octet-stream\r\n\r\n" + data + b"\r\n--XX--\r\n",
    ]
    status, body = guest.send("POST", "/setup/upload", b"".join(parts), "multipart/form-data; boundary=XX")
    assert (status, body.decode()) == (200, f"File Uploaded: {len(data)} bytes")
    assert guest.post_form("/file", file_path="$HOME/new/some file.txt") == (200, data)
    assert guest.post_form("/file", file_path="~/missing")[0] == 404
    assert guest.post_form("/file")[0] == 400
    status, listed = guest.post_json("/list_directory", path="~/new")
    assert listed["directory_tree"]["children"] == [{"type": "file", "name": "some file.txt"}]
    assert guest.post_json("/setup/open_file", path="~/new/some file.txt") == (200, "File opened successfully")
    assert guest.post_json("/setup/open_file", path="~/missing")[0] == 404


def test_platform_screen_size_cursor_terminal_and_desktop_path_are_reported(guest: Guest) -> None:
    assert guest.send("GET", "/platform") == (200, b"Linux")
    assert guest.post_json("/screen_size") == (200, {"width": 640, "height": 480})
    assert len(json.loads(guest.send("GET", "/cursor_position")[1])) == 2
    assert json.loads(guest.send("GET", "/terminal")[1]) == {"output": None, "status": "success"}
    assert guest.post_json("/desktop_path") == (200, {"desktop_path": "/home/user/Desktop"})


def test_scripts_report_their_output_and_return_code(guest: Guest) -> None:
    status, done = guest.post_json("/run_python", code="print(1 + 1)")
    assert (status, done["status"], done["output"], done["return_code"]) == (200, "success", "2\n", 0)
    status, done = guest.post_json("/run_bash_script", script="pwd; exit 4", working_dir="/tmp")
    assert (done["status"], done["output"], done["returncode"]) == ("error", "/tmp\n", 4)


def test_invalid_json_and_unknown_routes_are_rejected(guest: Guest) -> None:
    assert guest.send("POST", "/execute", b"{", "application/json")[0] == 400
    assert guest.send("GET", "/no/such/route")[0] == 404


def test_commands_that_import_pyautogui_control_the_focused_application(guest: Guest) -> None:
    guest.post_json("/setup/launch", command=["xterm", "-u8", "-e", "sh", "-c", "cat > /home/user/typed"])
    code = "import pyautogui; import time; pyautogui.FAILSAFE = False; "
    while guest.post_form("/window_size", app_class_name="XTerm")[0] != 200:
        pass
    steps = "pyautogui.click(320, 240); pyautogui.write('a < \u00e9', interval=0.01); pyautogui.press(['b', 'enter']); "
    status, done = guest.post_json("/execute", command=["python", "-c", code + steps + "pyautogui.hotkey('ctrl', 'd')"])
    assert (status, done["returncode"], done["error"]) == (200, 0, "")
    while guest.post_form("/window_size", app_class_name="XTerm")[0] == 200:
        pass
    assert guest.post_form("/file", file_path="/home/user/typed")[1].decode() == "a < \u00e9b\n"
