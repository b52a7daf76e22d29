"""What can be done to a desktop, in screen pixels. Knows no prompt grammar (`agent/`), no X server (`desktops/`)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class ActionKind(StrEnum):
    """The vocabulary that all agents and all desktops share."""

    CLICK = "click"
    DOUBLE_CLICK = "double_click"
    RIGHT_CLICK = "right_click"
    MOVE = "move"
    DRAG = "drag"
    SCROLL = "scroll"
    HOTKEY = "hotkey"
    TYPE = "type"
    WAIT = "wait"
    FINISHED = "finished"
    INFEASIBLE = "infeasible"


@dataclass(frozen=True)
class Action:
    """One action. Fields that a kind does not use stay at their defaults.

    Coordinates are screen pixels, origin top left. SCROLL moves `scroll_x`, `scroll_y` wheel notches, positive is
    right and down, at (x, y). HOTKEY presses `keys` in order and releases them in reverse; names as X11 key symbols in
    lower case plus the usual short ones ("ctrl", "enter", "left"). TYPE enters `text` as written, newlines as Return.
    WAIT waits `seconds`. FINISHED and INFEASIBLE end the episode and touch nothing.
    """

    kind: ActionKind
    x: int = 0
    y: int = 0
    end_x: int = 0
    end_y: int = 0
    scroll_x: int = 0
    scroll_y: int = 0
    keys: tuple[str, ...] = ()
    text: str = ""
    seconds: float = 0.0

    @property
    def ends_episode(self) -> bool:
        """Whether the policy is done, one way or the other."""
        return self.kind in (ActionKind.FINISHED, ActionKind.INFEASIBLE)

    def to_record(self) -> dict[str, Any]:
        """Plain values for a stored step; defaults left out."""
        empty = Action(self.kind)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if name == "kind" or value != getattr(empty, name)
        }
