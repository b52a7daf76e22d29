"""The desktop as the routes see it: screen, hands and windows together. Knows no protocol."""

from __future__ import annotations

import io
from pathlib import Path

from deskrl.actor.guest.commands import Commands
from deskrl.actor.guest.hands import Hands
from deskrl.actor.guest.screen import Screen
from deskrl.actor.guest.windows import Window, Windows

_NEW_WINDOW_S = 3.0


class Desk:
    """What can be seen and done on one running session."""

    def __init__(self, screen: Screen, hands: Hands, windows: Windows, commands: Commands) -> None:
        self.screen = screen
        self.hands = hands
        self.windows = windows
        self._commands = commands

    def encode_png(self, pixels: bytes) -> bytes:
        """`pixels` as PNG, with little effort at making it small."""
        from PIL import Image

        size = (self.screen.width, self.screen.height)
        file = io.BytesIO()
        Image.frombuffer("RGB", size, pixels, "raw", "BGRX", 0, 1).save(file, "PNG", compress_level=1)
        return file.getvalue()

    def open_path(self, path: Path, timeout_s: float) -> bool:
        """Open a file with its default application; whether its window came: titled after the file, or simply new."""
        before = self.windows.list()
        self._commands.open_with_default(path)

        def is_new(window: Window) -> bool:
            known = [other for other in before if other.id == window.id]
            return not known or (window.title != known[0].title and window.matches(path.name))

        # An application that shows the file already brings no new window: then its old one will do.
        opened = self.windows.wait_until(is_new, min(timeout_s, _NEW_WINDOW_S))
        if opened is None:
            opened = self.windows.wait_until(lambda shown: is_new(shown) or shown.matches(path.name), timeout_s)
        return opened is not None
