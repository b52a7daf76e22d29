"""Settling of the screen: which pixels are returned, and when a process keeps the screen from counting as settled."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from deskrl.actor.guest import framebuffer
from deskrl.actor.guest.framebuffer import Framebuffer

WIDTH, HEIGHT, HEADER_BYTES = 4, 2, 104


class Screen:
    """XWD file of a small screen that is drawn by a script: one call of `draw` for each poll."""

    def __init__(self, path: Path) -> None:
        header = [0] * 25
        header[0], header[4], header[5], header[11], header[12] = HEADER_BYTES, WIDTH, HEIGHT, 32, 4 * WIDTH
        path.write_bytes(struct.pack(">25I", *header).ljust(HEADER_BYTES, b"\0") + bytes(4 * WIDTH * HEIGHT))
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115 - written to during the test
        self.framebuffer = Framebuffer(path)

    def fill(self, value: int) -> None:
        self._file.seek(HEADER_BYTES)
        self._file.write(bytes([value]) * (4 * WIDTH * HEIGHT))


@pytest.fixture
def screen(tmp_path: Path) -> Screen:
    return Screen(tmp_path / "screen.xwd")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], bool]], None]:
    """Provide a function that sets what happens at poll n and whether a process is active then."""

    def set_script(at_poll: Callable[[int], bool]) -> None:
        polls = iter(range(10**6))
        monkeypatch.setattr(framebuffer, "is_any_process_active", lambda: at_poll(next(polls)))

    return set_script


def test_the_pixels_after_the_last_change_are_returned(
    screen: Screen, script: Callable[[Callable[[int], bool]], None]
) -> None:
    def draw(poll: int) -> bool:
        screen.fill(min(poll, 5))
        return False

    script(draw)
    assert screen.framebuffer.settle(quiet_s=0.02, limit_s=60) == bytes([5]) * 32


def test_the_screen_has_not_settled_while_a_process_is_active(
    screen: Screen, script: Callable[[Callable[[int], bool]], None]
) -> None:
    def draw(poll: int) -> bool:
        if poll == 30:
            screen.fill(7)
        return poll < 30

    script(draw)
    assert screen.framebuffer.settle(quiet_s=0.02, limit_s=60) == bytes([7]) * 32


def test_at_the_limit_the_current_pixels_are_returned(
    screen: Screen, script: Callable[[Callable[[int], bool]], None]
) -> None:
    def draw(poll: int) -> bool:
        screen.fill(9)
        return True

    script(draw)
    assert screen.framebuffer.settle(quiet_s=0.02, limit_s=0.05) == bytes([9]) * 32
