"""Desktop provider of a drawing board in pure Python, with colours, a caption and a button that saves.

desktop.provider = "drawing_board:BoardProvider"
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image, ImageDraw, ImageFont

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.desktops.base import Desktop, DesktopGone
from deskrl.actor.desktops.provider import DesktopProvider
from deskrl.core.config import DesktopConfig, Section

_BUTTON = 60
"""Height of the buttons in pixels, and width of a colour; the rest of the width is the button that saves."""


class BoardDesktop(Desktop):
    """One board. Dragging draws a line, typing appends to the caption, and the last button saves both as files."""

    def __init__(self, config: DesktopConfig, colours: tuple[str, ...]) -> None:
        self._size = (config.width, config.height)
        self._colours = colours
        self._is_running = False

    async def reset(self) -> None:
        """Clear the board, and remove the files."""
        self._board = Image.new("RGB", self._size, "white")
        self._colour, self._caption, self._files = self._colours[0], "", dict[str, bytes]()
        self._is_running = True

    async def close(self) -> None:
        """Close the board."""
        self._is_running = False

    async def is_alive(self) -> bool:
        """Return whether the board is open."""
        return self._is_running

    async def screenshot(self) -> Image.Image:
        """Return the board with its buttons and the caption."""
        self._check_running()
        screen = self._board.copy()
        pen, font = ImageDraw.Draw(screen), ImageFont.load_default(24)
        pen.rectangle((0, 0, screen.width, _BUTTON), fill="lightgrey")
        for index, colour in enumerate(self._colours):
            pen.rectangle((index * _BUTTON + 4, 4, (index + 1) * _BUTTON - 4, _BUTTON - 4), fill=colour)
        pen.text((len(self._colours) * _BUTTON + 20, 16), "Save", fill="black", font=font)
        pen.text((20, screen.height - 40), self._caption, fill="black", font=font)
        return screen

    async def act(self, action: Action) -> None:
        """Execute one action; kinds that the board does not use have no effect."""
        self._check_running()
        match action.kind:
            case ActionKind.CLICK if action.y < _BUTTON:
                self._press(action.x // _BUTTON)
            case ActionKind.DRAG:
                ends = (action.x, action.y, action.end_x, action.end_y)
                ImageDraw.Draw(self._board).line(ends, fill=self._colour, width=9)
            case ActionKind.TYPE:
                self._caption += action.text

    async def read_file(self, path: str) -> bytes:
        """Return a saved file."""
        self._check_running()
        if path not in self._files:
            raise FileNotFoundError(path)
        return self._files[path]

    def _press(self, button: int) -> None:
        if button < len(self._colours):
            self._colour = self._colours[button]
        else:
            self._board.save(image := io.BytesIO(), "PNG")
            self._files = {"~/board.png": image.getvalue(), "~/caption.txt": self._caption.encode()}

    def _check_running(self) -> None:
        if not self._is_running:
            raise DesktopGone("the board is closed")


class BoardProvider(DesktopProvider):
    """Provider of drawing boards, with a task suite of its own."""

    class Options(Section):  # noqa: D106
        colours: tuple[str, ...] = ("black", "red", "blue")

    starts_within_seconds: ClassVar = True
    task_suite: ClassVar = Path(__file__).parent / "tasks"

    def make(self, config: DesktopConfig, options: Any, name: str, run_root: Path) -> BoardDesktop:
        """Create a board."""
        return BoardDesktop(config, options.colours)
