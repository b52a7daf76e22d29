"""When a window manager is up: the guest waits for one that does what it is asked for, not for one that has a name."""

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

DEADLINE_S = 30.0

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
    with os.fdopen(number) as told:
        yield f":{told.readline().strip()}"
    server.terminate()
    server.wait()


def test_a_manager_is_up_once_it_answers_and_not_once_it_names_itself(display_name: str) -> None:
    display = Display(display_name)
    windows, root = Windows(display), display.screen().root
    assert not windows.manager_answers()
    name = display.intern_atom("_NET_SUPPORTING_WM_CHECK")
    root.change_property(name, Xatom.WINDOW, 32, [root.id])
    assert not windows.manager_answers(), "it has a name and does nothing yet"
    root.delete_property(name)
    display.sync()
    manager = subprocess.Popen(["openbox", "--config-file", os.devnull], env={**os.environ, "DISPLAY": display_name})
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not windows.manager_answers():
            assert time.monotonic() < deadline and manager.poll() is None
            time.sleep(0.01)
    finally:
        manager.terminate()
        manager.wait()
