"""Specification of the controlled browser: its calls, the events that are kept, and pages that are closed."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from deskrl.actor.guest.controlled_browser import BrowserError, ControlledBrowser


class BrowserDouble:
    """Session whose spawner starts no program: it keeps the descriptor that the browser would get."""

    environment: dict[str, str] = {}  # noqa: RUF012 - as in a session

    def __init__(self) -> None:
        self.spawner = self
        self.command: Sequence[str] = ()

    def spawn(self, command: Sequence[str], environment: object, folder: str, output: tuple[int, int]) -> BrowserDouble:
        self.command = command
        self.connection = socket.socket(fileno=os.dup(output[0]))
        self.connection.settimeout(10)
        self._buffer = b""
        return self

    def forget(self) -> None:
        """Nothing runs."""

    def receive(self) -> dict[str, Any]:
        """Return the next message to the browser."""
        while b"\0" not in self._buffer:
            self._buffer += self.connection.recv(65536)
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message

    def send(self, *messages: dict[str, Any]) -> None:
        """Send messages of the browser."""
        self.connection.sendall(b"".join(json.dumps(message).encode() + b"\0" for message in messages))

    def reply(self, **fields: Any) -> None:
        """Answer the next call in a thread."""

        def answer() -> None:
            self.send(fields | {"id": self.receive()["id"]})

        threading.Thread(target=answer).start()


@pytest.fixture
def started() -> Iterator[tuple[ControlledBrowser, BrowserDouble]]:
    double = BrowserDouble()
    browser = ControlledBrowser(double)  # type: ignore[arg-type]
    browser.start(["chromium", "page.html"], ["Wanted.event"])
    assert double.receive()["method"] == "Target.setDiscoverTargets"
    yield browser, double
    double.connection.close()


def event(method: str = "Wanted.event", **parameters: Any) -> dict[str, Any]:
    return {"method": method, "params": parameters}


def page(name: str) -> dict[str, Any]:
    return event("Target.targetCreated", targetInfo={"type": "page", "targetId": name})


def test_a_call_returns_the_result_or_raises_the_browsers_error(
    started: tuple[ControlledBrowser, BrowserDouble],
) -> None:
    browser, double = started
    assert list(double.command[-2:]) == ["chromium", "page.html"]
    double.reply(result={"value": 3})
    assert browser.call("Runtime.evaluate", {}, "session", 10) == {"value": 3}
    double.reply(error={"message": "no such method"})
    with pytest.raises(BrowserError, match=r"Nothing\.here: no such method"):
        browser.call("Nothing.here", {}, None, 10)


def test_every_page_but_the_first_one_is_closed(started: tuple[ControlledBrowser, BrowserDouble]) -> None:
    _, double = started
    double.send(page("first"), page("second"))
    closing = double.receive()
    assert (closing["method"], closing["params"]) == ("Target.closeTarget", {"targetId": "second"})


def test_the_first_events_are_kept_and_later_ones_cannot_displace_them(
    started: tuple[ControlledBrowser, BrowserDouble],
) -> None:
    browser, double = started
    double.send(event("Other.event"), event(text="x" * 5000), *(event(number=number) for number in range(200)))
    double.reply(result={})
    browser.call("Browser.getVersion", {}, None, 10)
    numbers = [each["params"]["number"] for each in browser.events()]
    assert numbers == list(range(len(numbers))) and len(numbers) == 64


def test_after_the_browser_has_exited_its_events_remain_and_calls_fail(
    started: tuple[ControlledBrowser, BrowserDouble],
) -> None:
    browser, double = started
    double.send(event(number=1))
    double.connection.shutdown(socket.SHUT_RDWR)
    for _ in range(2):
        with pytest.raises(BrowserError, match="has exited"):
            browser.call("Browser.getVersion", {}, None, 10)
    while not browser.events():  # the thread that reads may not have seen the message yet
        time.sleep(0.01)
    assert [each["params"] for each in browser.events()] == [{"number": 1}]


def test_a_browser_that_does_not_reply_and_a_second_one_are_errors(
    started: tuple[ControlledBrowser, BrowserDouble],
) -> None:
    browser, _ = started
    with pytest.raises(BrowserError, match=r"did not reply to Browser\.getVersion within 0\.01 s"):
        browser.call("Browser.getVersion", {}, None, 0.01)
    with pytest.raises(BrowserError, match="was started before"):
        browser.start(["chromium"], [])
    with pytest.raises(BrowserError, match="no controlled browser was started"):
        ControlledBrowser(BrowserDouble()).call("Browser.getVersion", {}, None, 1)  # type: ignore[arg-type]
