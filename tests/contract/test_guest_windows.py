"""A window manager counts as ready once it processes requests, not once it has announced its name."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator

import pytest
from Xlib import Xatom
from Xlib.display import Display

from deskrl.actor.guest.windows import Windows
from deskrl.actor.guest.x_connection import XConnection

DEADLINE_S = 60.0

pytestmark = pytest.mark.skipif(
    not (shutil.which("Xvfb") and shutil.which("openbox")), reason="Xvfb or openbox is not installed"
)


@pytest.fixture
def display_name() -> Iterator[str]:
    number, ready = os.pipe()
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", str(ready), "-ac", "-nolisten", "tcp"], pass_fds=(ready,), stderr=subprocess.DEVNULL
    )
    os.close(ready)
    with os.fdopen(number) as output:
        yield f":{output.readline().strip()}"
    server.terminate()
    server.wait()


def test_a_window_manager_is_ready_only_once_it_processes_requests(
    display_name: str,
) -> None:
    display = Display(display_name)
    windows, root = Windows(XConnection(display_name)), display.screen().root
    assert not windows.is_manager_ready()
    name = display.intern_atom("_NET_SUPPORTING_WM_CHECK")
    root.change_property(name, Xatom.WINDOW, 32, [root.id])
    display.sync()
    assert not windows.is_manager_ready(), "it has only announced its name"
    root.delete_property(name)
    display.sync()
    manager = subprocess.Popen(["openbox", "--config-file", os.devnull], env={**os.environ, "DISPLAY": display_name})
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not windows.is_manager_ready():
            assert time.monotonic() < deadline and manager.poll() is None
            time.sleep(0.01)
    finally:
        manager.terminate()
        manager.wait()
