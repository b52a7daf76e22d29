"""Frames of an episode for display: screenshot, shape and caption of the action, thought and action text.

Text of the policy is passed through unchanged; the templates escape it.
"""

from __future__ import annotations

import base64
import io
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from deskrl.analysis.report.run_history import number
from deskrl.core.step_codec import Step

_log = logging.getLogger(__name__)

_IMAGES_BYTES = 3_300_000
"""Maximum size of all screenshots on a page, before base64 adds a third."""
_LEVELS = ((640, 82), (640, 60), (480, 60), (320, 50))
"""Widths and JPEG qualities, tried in turn until a screenshot fits its share of the maximum."""
_MAX_TEXT = 2_000
_CALL = re.compile(r"^(?:<tool_call>|## Code:|```python|\{\"type\": )", re.MULTILINE)
"""Beginning of the action in the action languages that write calls or code."""
_CAPTIONS = {
    "double_click": "double click",
    "triple_click": "triple click",
    "right_click": "right click",
    "middle_click": "middle click",
    "infeasible": "declared infeasible",
}
_KEYS = {"ctrl": "Ctrl", "alt": "Alt", "shift": "Shift", "super": "Super", "enter": "Enter", "return": "Enter"}


@dataclass(frozen=True)
class Mark:
    """Shape drawn on a screenshot, in screen pixels; `kind` is one of the shapes of the template."""

    kind: str
    x: float = 0.0
    y: float = 0.0
    end_x: float = 0.0
    end_y: float = 0.0
    arrow_head: str = ""
    """Corners of an arrow head, as an SVG list of points."""


@dataclass(frozen=True)
class Frame:
    """One step, or the end state, which has no number and no texts."""

    number: int | None
    """Number of the step, counted from 1."""
    image: str
    mark: Mark | None
    badge: str
    badge_kind: str
    thought: str
    action: str


def make_frame(step: Step, width: int, height: int) -> Frame:
    """Return the frame of a step.

    Args:
        step: stored step.
        width: width of the screen in pixels, the unit of the action's coordinates.
        height: height of the screen in pixels.
    """
    thought, action = split_thought_and_action(step.text)
    badge, badge_kind = action_badge(step.action)
    mark = action_mark(step.action, width, height)
    return Frame(step.index + 1, step.screenshot, mark, badge, badge_kind, thought, action)


def split_thought_and_action(text: str) -> tuple[str, str]:
    """Split the policy's text before its call or code, or at the last "Action:"; else all of it is the action."""
    if call := _CALL.search(text):
        return _shortened(text[: call.start()].strip()), _shortened(text[call.start() :].strip())
    head, marker, action = text.rpartition("Action:")
    if not marker:
        return "", _shortened(text.strip())
    return _shortened(head.strip().removeprefix("Thought:").strip()), _shortened(action.strip())


def action_mark(action: Mapping[str, Any], width: int, height: int) -> Mark | None:
    """Return the shape of an action that has a position; None for other actions."""
    kind = str(action.get("kind", ""))
    x, y = _coordinate(action, "x", width), _coordinate(action, "y", height)
    if kind in ("click", "double_click", "triple_click", "right_click", "middle_click", "move"):
        return Mark(kind, x, y)
    if kind == "drag":
        return _arrow(kind, x, y, _coordinate(action, "end_x", width), _coordinate(action, "end_y", height), width)
    if kind == "scroll":
        dx, dy = number(action, "scroll_x") or 0.0, number(action, "scroll_y") or 0.0
        reach = 0.09 * width / (math.hypot(dx, dy) or 1.0)
        return _arrow(kind, x, y, x + dx * reach, y + dy * reach, width)
    return None


def action_badge(action: Mapping[str, Any]) -> tuple[str, str]:
    """Return the caption of an action and the style of the caption: keys, text, end or plain.

    Clicks and drags have no caption, since their shape suffices.
    """
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
        return _CAPTIONS.get(kind, kind), "end"
    if kind in ("click", "drag"):
        return "", "plain"
    return (_CAPTIONS.get(kind, kind), "plain") if kind else ("not an action", "end")


def _scroll_caption(action: Mapping[str, Any]) -> str:
    dx, dy = number(action, "scroll_x") or 0.0, number(action, "scroll_y") or 0.0
    vertical = f"{'down' if dy > 0 else 'up'} {abs(dy):g}" if dy else ""
    sideways = f"{'right' if dx > 0 else 'left'} {abs(dx):g}" if dx else ""
    return " ".join(part for part in ("scroll", vertical, sideways) if part)


def _coordinate(action: Mapping[str, Any], key: str, limit: int) -> float:
    """Return a coordinate, clipped to the screen; 0 if the action record omits it."""
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
    # The shaft ends inside the head; otherwise its blunt end would show beyond the tip.
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


def encode_data_uris(images: Mapping[str, bytes]) -> dict[str, str]:
    """Encode screenshots as data URIs, at most 640 pixels wide, within the size limit of a page.

    Data that is not an image is left out; the page shows a gap in its place.
    """
    share = _IMAGES_BYTES // max(1, len(images))
    uris = {}
    for name, data in images.items():
        try:
            with Image.open(io.BytesIO(data), formats=["PNG", "JPEG"]) as picture:
                uris[name] = _encode(picture.convert("RGB"), share)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            _log.warning("report: screenshot %s is left out: it is not an image", name[:12])
    return uris


def _encode(picture: Image.Image, share: int) -> str:
    """Encode as PNG if it is no larger than a good JPEG, else as the first JPEG level within the share, or the last."""
    kind, data = "jpeg", _jpeg(picture, *_LEVELS[0])
    # Flat user interfaces are often smaller as PNG, which has no compression artefacts.
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
