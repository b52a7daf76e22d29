"""Game behind OpenEnv servers of tests: a white quarter of a black image must be clicked on.

The seed decides on the quarter. Hitting it is rewarded with 1 and ends the episode, and missing it costs 0.25.
"""

from __future__ import annotations

import base64
import io
from random import Random
from typing import Any

from PIL import Image, ImageDraw

WIDTH, HEIGHT = 64, 48


def quarter_of(seed: int) -> int:
    """Return the quarter that must be clicked on: 0 and 1 at the top, 2 and 3 at the bottom."""
    return Random(seed).randrange(4)


def centre_of(quarter: int) -> tuple[int, int]:
    """Return the centre of a quarter in pixels of the image."""
    return WIDTH // 4 + WIDTH // 2 * (quarter % 2), HEIGHT // 4 + HEIGHT // 2 * (quarter // 2)


class ClickGame:
    """The game."""

    def __init__(self) -> None:
        self._quarter = 0

    def reset(self, seed: int | None, quarter: int | None) -> dict[str, Any]:
        """Start an episode and return the fields of its observation."""
        self._quarter = quarter_of(seed or 0) if quarter is None else quarter
        return self._observation(0.0, False)

    def click(self, x: int, y: int) -> dict[str, Any]:
        """Click at a pixel of the image and return the fields of the observation."""
        hit = int(x >= WIDTH // 2) + 2 * int(y >= HEIGHT // 2) == self._quarter
        return self._observation(1.0 if hit else -0.25, hit)

    def _observation(self, reward: float, done: bool) -> dict[str, Any]:
        image = Image.new("RGB", (WIDTH, HEIGHT))
        x, y = centre_of(self._quarter)
        box = (x - WIDTH // 4, y - HEIGHT // 4, x + WIDTH // 4 - 1, y + HEIGHT // 4 - 1)
        ImageDraw.Draw(image).rectangle(box, fill="white")
        image.save(file := io.BytesIO(), "PNG")
        screenshot = base64.b64encode(file.getvalue()).decode()
        return {"screenshot": screenshot, "mission": "Click on white.", "reward": reward, "done": done}
