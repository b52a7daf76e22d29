"""The wait for windows: which programs are waited for, and when their windows are complete."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any, cast

import pytest
from PIL import Image

from deskrl.actor.desktops.base import CommandResult, Desktop
from deskrl.actor.task import TypedItem
from deskrl.actor.tasks.window_wait import WindowWait, started_programs
from deskrl.core.config import DesktopConfig

SIZE = (200, 100)
BACKGROUND, WHITE = (10, 20, 30), (255, 255, 255)
Frame = tuple[list[dict[str, Any]], Image.Image]


def launch(command: str | list[str]) -> TypedItem:
    return TypedItem("launch", {"command": command})


@pytest.mark.parametrize(
    ("steps", "programs"),
    [
        ([], None),
        ([TypedItem("execute", {"command": "gimp &"}), TypedItem("upload_file", {"files": []})], None),
        ([launch(["gimp", "a.png"])], {"gimp"}),
        ([launch("VLC_VERBOSE=-1 vlc --start-time=5 a.mp4")], {"vlc"}),
        ([launch("/usr/bin/nautilus /home/user")], {"nautilus"}),
        ([launch("nohup env LANG=C code -n")], {"code"}),
        (
            [launch("google-chrome --remote-debugging-port=1337"), launch(["socat", "tcp-listen:9222", "tcp:1337"])],
            {"google-chrome"},
        ),
        ([launch(["google-chrome", "a"]), launch(["google-chrome", "b"])], {"google-chrome"}),
        ([launch(["gimp"]), launch(["vlc"])], {"gimp", "vlc"}),
        ([TypedItem("open", {"path": "/home/user/a.odt"})], set()),
        ([launch(["gimp"]), TypedItem("close_window", {"window_name": "GIMP"})], set()),
        ([launch("bash -c 'gimp'")], set()),
        ([launch("gimp 'unterminated")], set()),
    ],
)
def test_each_launched_program_that_shows_windows_is_waited_for(
    steps: Sequence[TypedItem], programs: set[str] | None
) -> None:
    assert started_programs(steps) == programs


class DesktopDouble:
    """Desktop that shows one frame after another, the next one after each screenshot or list of windows.

    Args:
        frames: windows and screen; the last one stays.
        can_observe_host: False: windows are listed by a shell program.
    """

    def __init__(self, frames: Sequence[Frame], can_observe_host: bool) -> None:
        self._frames = list(frames)
        self.can_observe_host = can_observe_host
        self.num_polls = 0

    def _next(self) -> Frame:
        self.num_polls += 1
        return self._frames.pop(0) if len(self._frames) > 1 else self._frames[0]

    async def windows(self) -> list[dict[str, Any]]:
        """Return the windows of the current frame."""
        assert self.can_observe_host
        return self._frames[0][0]

    async def execute(self, command: str, *, shell: bool = False, timeout_s: float = 30.0) -> CommandResult:
        """Return the windows of the current frame as the shell program prints them."""
        assert "wmctrl -lGx" in command and shell and not self.can_observe_host
        windows = self._frames[0][0]
        return CommandResult(0, stack_line(windows) + "".join(map(line, windows)) + "garbage\n", "")

    async def settle(self, min_quiet_s: float = 0.0) -> Image.Image:
        """Return the screen of the current frame."""
        return self._next()[1]


def stack_line(windows: Sequence[dict[str, Any]]) -> str:
    """Return the ids of the windows from the bottom of the stack to its top, as printed by xprop."""
    shown = [window for window in windows if window["stack_position"] is not None]
    ids = ", ".join(hex(window["id"]) for window in sorted(shown, key=lambda window: window["stack_position"]))
    return f"_NET_CLIENT_LIST_STACKING(WINDOW): window id # {ids}\n"


def line(window: dict[str, Any]) -> str:
    kind = "_NET_WM_WINDOW_TYPE_SPLASH" if window["is_splash"] else "_NET_WM_WINDOW_TYPE_NORMAL"
    place = f"{window['x']} {window['y']} {window['width']} {window['height']}"
    title = window["title"]
    state = "_NET_WM_STATE:  not found."
    return f"_NET_WM_WINDOW_TYPE(ATOM) = {kind}{state}|0x{window['id']:08x}  0 {place} gimp.Gimp host {title}\n"


def window(
    number: int,
    title: str = "GNU Image",
    *,
    is_splash: bool = False,
    stack_position: int | None = 0,
    box: tuple[int, int, int, int] = (20, 10, 180, 90),
) -> dict[str, Any]:
    left, top, right, bottom = box
    geometry = {"x": left, "y": top, "width": right - left, "height": bottom - top}
    names = {"id": number, "title": title, "window_class": "gimp.Gimp"}
    return {**names, "is_splash": is_splash, "stack_position": stack_position, **geometry}


def screen(content: str) -> Image.Image:
    """Return a screen with a window that is empty, white with a pointer in the centre, or has content."""
    image = Image.new("RGB", SIZE, BACKGROUND)
    if content != "empty":
        image.paste(WHITE, (20, 10, 180, 90))
        image.paste((0, 0, 0), (100, 50, 105, 58))
    if content == "drawn":
        image.paste((200, 0, 0), (30, 20, 40, 25))
    return image


def wait(
    frames: Sequence[Frame], *, can_observe_host: bool = True, limit_s: float = 20.0, setup_timeout_s: float = 60.0
) -> DesktopDouble:
    """Wait for the window of GIMP on a desktop that shows these frames."""
    desktop = DesktopDouble([([], screen("empty")), *frames], can_observe_host)
    config = DesktopConfig(window_timeout_s=limit_s, settle_timeout_s=0.5, setup_timeout_s=setup_timeout_s)

    async def scenario() -> None:
        waiting = WindowWait(cast(Desktop, desktop), "task", [launch(["gimp"])], config)
        await waiting.begin()
        desktop._next()
        await waiting.wait()

    asyncio.run(scenario())
    return desktop


@pytest.mark.parametrize("can_observe_host", [True, False])
def test_the_wait_ends_when_the_window_shows_content(can_observe_host: bool, caplog: pytest.LogCaptureFixture) -> None:
    desktop = wait(
        [
            ([window(7)], screen("white")),
            ([window(7, "half loaded")], screen("drawn")),
            ([window(7, "loaded")], screen("drawn")),
        ],
        can_observe_host=can_observe_host,
    )
    assert desktop._frames == [([window(7, "loaded")], screen("drawn"))] and not caplog.records


@pytest.mark.parametrize("can_observe_host", [True, False])
@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (([], screen("empty")), "0 new windows for gimp"),
        (([window(1, "GIMP Startup", is_splash=True)], screen("drawn")), "a splash screen is shown"),
        (([window(7)], screen("white")), "a window shows one colour only"),
    ],
)
def test_an_incomplete_window_is_waited_for_until_the_limit(
    frame: Frame, reason: str, can_observe_host: bool, caplog: pytest.LogCaptureFixture
) -> None:
    started_s = time.monotonic()
    with caplog.at_level(logging.WARNING):
        wait([frame], can_observe_host=can_observe_host, limit_s=0.2)
    assert 0.2 <= time.monotonic() - started_s < 5
    (record,) = caplog.records
    assert record.getMessage() == f"task: the episode begins before the windows are complete: {reason}"


LOWER, UPPER = (60, 30, 120, 70), (50, 20, 130, 80)


@pytest.mark.parametrize("can_observe_host", [True, False])
@pytest.mark.parametrize("stack_positions", [(0, 1), (None, 0)], ids=["covered", "minimised"])
def test_a_window_that_cannot_be_seen_is_not_waited_for(
    stack_positions: tuple[int | None, int], can_observe_host: bool, caplog: pytest.LogCaptureFixture
) -> None:
    lower, upper = stack_positions
    windows = [window(7, stack_position=lower, box=LOWER), window(8, stack_position=upper, box=UPPER)]
    picture = screen("empty")
    picture.paste(WHITE, UPPER)
    picture.paste((200, 0, 0), (52, 22, 60, 25))
    wait([(windows, picture)], can_observe_host=can_observe_host)
    assert not caplog.records


@pytest.mark.parametrize("can_observe_host", [True, False])
def test_the_visible_part_of_a_window_is_waited_for(can_observe_host: bool, caplog: pytest.LogCaptureFixture) -> None:
    windows = [window(7, stack_position=0), window(8, stack_position=1, box=(20, 10, 50, 90))]
    wait([(windows, screen("drawn"))], can_observe_host=can_observe_host, limit_s=0.2)
    (record,) = caplog.records
    assert record.getMessage().endswith("a window shows one colour only")


def test_a_complete_window_costs_one_screenshot() -> None:
    desktop = wait([([window(7)], screen("drawn"))])
    assert desktop.num_polls == 2, "one before the wait, and one in it"


def test_the_wait_ends_before_the_time_limit_of_the_setup(caplog: pytest.LogCaptureFixture) -> None:
    started_s = time.monotonic()
    wait([([], screen("empty"))], setup_timeout_s=0.5)
    assert time.monotonic() - started_s < 5 and len(caplog.records) == 1


def test_the_limit_0_disables_the_wait() -> None:
    desktop = wait([([], screen("empty"))], limit_s=0.0)
    assert desktop.num_polls == 1
