"""Steps as a person looks at them: the screenshot, the action drawn on it, thought and action apart.

Knows action records (screen pixels) and encodes pictures; nothing of replay and nothing of markup. What the policy
wrote passes through as plain text: escaping is the template's.
"""

from __future__ import annotations

import base64
import io
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from deskrl.core.report.history import number
from deskrl.core.trajectory import Step

logger = logging.getLogger(__name__)

_IMAGES_BYTES = 3_300_000
"""Room for all screenshots of a page, before base64 makes four bytes of three."""
_LEVELS = ((640, 82), (640, 60), (480, 60), (320, 50))
"""Widths and JPEG qualities, tried in turn until a screenshot fits its share."""
_MAX_TEXT = 2_000
_TURNS = {"double_click": "double click", "right_click": "right click", "infeasible": "declared infeasible"}
_KEYS = {"ctrl": "Ctrl", "alt": "Alt", "shift": "Shift", "super": "Super", "enter": "Enter", "return": "Enter"}


@dataclass(frozen=True)
class Mark:
    """What is drawn on the screenshot, in screen pixels. `kind` is one of the template's shapes."""

    kind: str
    x: float = 0.0
    y: float = 0.0
    end_x: float = 0.0
    end_y: float = 0.0
    arrow_head: str = ""
    """Corners of the head of an arrow, as an SVG list of points."""


@dataclass(frozen=True)
class Frame:
    """One step, or the end state (no number, no texts)."""

    number: int | None
    image: str
    mark: Mark | None
    badge: str
    badge_kind: str
    thought: str
    action: str


def frame_of(step: Step, width: int, height: int) -> Frame:
    """A step ready to be shown.

    Args:
        step: as stored.
        width: of the screen, whose pixels the action record speaks of.
        height: likewise.
    """
    thought, action = split_text(step.text)
    badge, badge_kind = badge_of(step.action)
    mark = mark_of(step.action, width, height)
    return Frame(step.index + 1, step.screenshot, mark, badge, badge_kind, thought, action)


def split_text(text: str) -> tuple[str, str]:
    """Thought and action; a text of another form is all action."""
    head, marker, action = text.rpartition("Action:")
    if not marker:
        return "", _shortened(text.strip())
    return _shortened(head.strip().removeprefix("Thought:").strip()), _shortened(action.strip())


def mark_of(action: Mapping[str, Any], width: int, height: int) -> Mark | None:
    """The shape for an action that happens at a place."""
    kind = str(action.get("kind", ""))
    x, y = _place(action, "x", width), _place(action, "y", height)
    if kind in ("click", "double_click", "right_click", "move"):
        return Mark(kind, x, y)
    if kind == "drag":
        return _arrow(kind, x, y, _place(action, "end_x", width), _place(action, "end_y", height), width)
    if kind == "scroll":
        dx, dy = number(action, "scroll_x") or 0.0, number(action, "scroll_y") or 0.0
        reach = 0.09 * width / (math.hypot(dx, dy) or 1.0)
        return _arrow(kind, x, y, x + dx * reach, y + dy * reach, width)
    return None


def badge_of(action: Mapping[str, Any]) -> tuple[str, str]:
    """Caption of an action without a place, or with a shape that needs words, and its style: keys, text, end, plain."""
    kind = str(action.get("kind", ""))
    if kind == "type":
        return _shortened(str(action.get("text", "")), 120), "text"
    if kind == "hotkey":
        keys = action.get("keys")
        names = [str(key) for key in keys] if isinstance(keys, list | tuple) else []
        return " + ".join(_KEYS.get(key.lower(), key.upper() if len(key) == 1 else key) for key in names), "keys"
    if kind == "scroll":
        return _scroll_caption(action), "plain"
    if kind == "wait":
        return f"wait {number(action, 'seconds') or 0:g} s", "plain"
    if kind in ("finished", "infeasible"):
        return _TURNS.get(kind, kind), "end"
    if kind in ("click", "drag"):
        return "", "plain"
    return (_TURNS.get(kind, kind), "plain") if kind else ("not an action", "end")


def _scroll_caption(action: Mapping[str, Any]) -> str:
    dx, dy = number(action, "scroll_x") or 0.0, number(action, "scroll_y") or 0.0
    vertical = f"{'down' if dy > 0 else 'up'} {abs(dy):g}" if dy else ""
    sideways = f"{'right' if dx > 0 else 'left'} {abs(dx):g}" if dx else ""
    return " ".join(part for part in ("scroll", vertical, sideways) if part)


def _place(action: Mapping[str, Any], key: str, limit: int) -> float:
    """A coordinate, 0 where the record leaves it out; beyond the screen it is drawn at the edge."""
    return min(max(number(action, key) or 0.0, 0.0), float(limit))


def _arrow(kind: str, x: float, y: float, end_x: float, end_y: float, width: int) -> Mark:
    length = math.hypot(end_x - x, end_y - y)
    if length == 0:
        return Mark(kind, x, y, x, y)
    size = width / 36
    ux, uy = (end_x - x) / length, (end_y - y) / length
    base_x, base_y = end_x - ux * size, end_y - uy * size
    side_x, side_y = -uy * size * 0.5, ux * size * 0.5
    corners = [(end_x, end_y), (base_x + side_x, base_y + side_y), (base_x - side_x, base_y - side_y)]
    # The shaft ends inside the head, so that its blunt end does not stick out of the tip.
    return Mark(
        kind,
        x,
        y,
        end_x - ux * size * 0.8,
        end_y - uy * size * 0.8,
        " ".join(f"{cx:.1f},{cy:.1f}" for cx, cy in corners),
    )


def _shortened(text: str, limit: int = _MAX_TEXT) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def data_uris(images: Mapping[str, bytes]) -> dict[str, str]:
    """Screenshots as data URIs, at most 640 pixels wide, all together within the page's room.

    One that is no picture is left out: the page shows a gap in its place.
    """
    share = _IMAGES_BYTES // max(1, len(images))
    uris = {}
    for name, data in images.items():
        try:
            with Image.open(io.BytesIO(data), formats=["PNG", "JPEG"]) as picture:
                uris[name] = _encode(picture.convert("RGB"), share)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            logger.warning("report: what was stored as screenshot %s is no picture, or damaged on disk", name[:12])
    return uris


def _encode(picture: Image.Image, share: int) -> str:
    """PNG where it is no larger than a good JPEG, else the first JPEG level that fits the share, or the last one."""
    kind, data = "jpeg", _jpeg(picture, *_LEVELS[0])
    # Flat user interfaces are often smaller as PNG, and then also without artefacts.
    png = _saved(_scaled(picture, _LEVELS[0][0]), "PNG")
    if len(png) <= min(len(data), share):
        kind, data = "png", png
    for width, quality in _LEVELS[1:]:
        if len(data) <= share:
            break
        data = _jpeg(picture, width, quality)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _jpeg(picture: Image.Image, width: int, quality: int) -> bytes:
    return _saved(_scaled(picture, width), "JPEG", quality=quality, optimize=True, subsampling=0)


def _scaled(picture: Image.Image, width: int) -> Image.Image:
    if picture.width <= width:
        return picture
    return picture.resize((width, max(1, round(picture.height * width / picture.width))), Image.Resampling.LANCZOS)


def _saved(picture: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()
