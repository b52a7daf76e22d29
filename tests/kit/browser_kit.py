"""Headless Chromium for tests, controlled through its debugging pipe."""

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

_TIMEOUT_S = 60


class Browser:
    """One tab. Script errors and failed or blocked requests of its pages are collected in `page_errors`."""

    def __init__(self, width: int = 1400, height: int = 900) -> None:
        program = shutil.which("chromium")
        if program is None:
            pytest.skip("chromium is not installed (deploy/install.sh installs it)")
        self._profile = tempfile.mkdtemp(prefix="deskrl-browser-")
        to_browser, self._requests = os.pipe()
        self._replies, from_browser = os.pipe()
        # Chromium reads file descriptor 3 and writes 4; the shell redirects the pipes to them.
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
        self.page_errors: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def open(self, url: str) -> None:
        """Open a page and wait until it has loaded."""
        self._events.clear()
        self._call("Page.navigate", url=url)
        self.wait_for_load()

    def wait_for_load(self) -> None:
        """Wait until the next page has loaded."""
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._read_message()
        self._events.clear()

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression in the page; a promise is awaited."""
        outcome = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in outcome, outcome
        return outcome["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key, for example `ArrowRight`."""
        for kind in ("rawKeyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key)

    def click(self, x: float, y: float, *, num: int = 1, button: str = "left") -> None:
        """Click a point of the window `num` times in a row."""
        for count in range(1, num + 1):
            for kind in ("mousePressed", "mouseReleased"):
                self._mouse(kind, x, y, button=button, clickCount=count)

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Press the left button at a point of the window, and release it at another one."""
        self._mouse("mousePressed", *start, button="left", clickCount=1)
        self._mouse("mouseMoved", *end, button="left", buttons=1)
        self._mouse("mouseReleased", *end, button="left", clickCount=1)

    def scroll(self, x: float, y: float, pixels: float) -> None:
        """Turn the wheel at a point of the window; positive values scroll down."""
        self._mouse("mouseWheel", x, y, deltaX=0, deltaY=pixels)

    def type_text(self, text: str) -> None:
        """Press and release the key of each character."""
        for character in text:
            self._call("Input.dispatchKeyEvent", type="keyDown", key=character, text=character)
            self._call("Input.dispatchKeyEvent", type="keyUp", key=character)

    def compose(self, *drafts: str) -> None:
        """Compose a text as an input method or a dead key does: show each draft, then insert the last one."""
        for draft in drafts:
            self._call("Input.imeSetComposition", text=draft, selectionStart=len(draft), selectionEnd=len(draft))
        self._call("Input.insertText", text=drafts[-1])

    def screenshot(self, path: Path) -> None:
        """Save a screenshot of the whole page as PNG."""
        data = self._call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        """Kill the browser with all its processes."""
        os.close(self._requests)
        os.close(self._replies)
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(_TIMEOUT_S)
        shutil.rmtree(self._profile, ignore_errors=True)

    def _mouse(self, kind: str, x: float, y: float, **arguments: Any) -> None:
        self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **arguments)

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        number = next(self._numbers)
        request = {"id": number, "method": method, "params": arguments}
        if self._session is not None:
            request["sessionId"] = self._session
        os.write(self._requests, json.dumps(request).encode() + b"\0")
        while True:
            message = self._read_message()
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                result: dict[str, Any] = message["result"]
                return result

    def _read_message(self) -> dict[str, Any]:
        """Return the next message; events are also collected."""
        while b"\0" not in self._buffer:
            data = os.read(self._replies, 1 << 20)
            assert data, "the browser has exited"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self._events.append(message)
            if message["method"] == "Runtime.exceptionThrown":
                self.page_errors.append(str(message["params"]["exceptionDetails"]))
            if message["method"] == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
                self.page_errors.append(message["params"]["entry"]["text"])
        return message
