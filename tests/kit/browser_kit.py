"""A real browser for tests: Chromium without a window, driven over its debugging pipe. Knows no page in particular."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

_PATIENCE_S = 60


class Browser:
    """One tab. What goes wrong in a page (a script's error, a refused request) is kept in `complaints`."""

    def __init__(self, width: int = 1400, height: int = 900) -> None:
        program = shutil.which("chromium")
        if program is None:
            pytest.skip("chromium is not installed (deploy/install.sh installs it)")
        self._profile = tempfile.mkdtemp(prefix="deskrl-browser-")
        to_browser, self._requests = os.pipe()
        self._replies, from_browser = os.pipe()
        # The browser reads file descriptor 3 and writes 4: the shell puts the pipes there.
        command = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
        options += [f"--window-size={width},{height}", f"--user-data-dir={self._profile}", "--hide-scrollbars"]
        self._process = subprocess.Popen(
            ["bash", "-c", command, "browser", program, *options],
            pass_fds=(to_browser, from_browser),
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer = b""
        self._numbers = itertools.count(1)
        self._session: str | None = None
        self._events: list[dict[str, Any]] = []
        self.complaints: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def open(self, url: str) -> None:
        """Go to a page and wait until it is loaded."""
        self._events.clear()
        self._call("Page.navigate", url=url)
        self.wait_for_load()

    def wait_for_load(self) -> None:
        """Wait until the page that something led to is loaded."""
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._take()
        self._events.clear()

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page; a promise is waited for."""
        outcome = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in outcome, outcome
        return outcome["result"].get("value")

    def press(self, key: str) -> None:
        """A key of the keyboard, as `ArrowRight`."""
        for kind in ("rawKeyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key)

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        data = self._call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        """End the browser with all its processes."""
        os.close(self._requests)
        os.close(self._replies)
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(_PATIENCE_S)
        shutil.rmtree(self._profile, ignore_errors=True)

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        number = next(self._numbers)
        request = {"id": number, "method": method, "params": arguments}
        if self._session is not None:
            request["sessionId"] = self._session
        os.write(self._requests, json.dumps(request).encode() + b"\0")
        while True:
            message = self._take()
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                result: dict[str, Any] = message["result"]
                return result

    def _take(self) -> dict[str, Any]:
        """The next message; events are kept."""
        while b"\0" not in self._buffer:
            data = os.read(self._replies, 1 << 20)
            assert data, "the browser has ended"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self._events.append(message)
            if message["method"] == "Runtime.exceptionThrown":
                self.complaints.append(str(message["params"]["exceptionDetails"]))
            if message["method"] == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
                self.complaints.append(message["params"]["entry"]["text"])
        return message
