"""Desktop actions: the vocabulary that policies, tasks and desktops share, in screen pixels."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class ActionKind(StrEnum):
    """Kinds of actions."""

    CLICK = "click"
    DOUBLE_CLICK = "double_click"
    TRIPLE_CLICK = "triple_click"
    RIGHT_CLICK = "right_click"
    MIDDLE_CLICK = "middle_click"
    MOVE = "move"
    DRAG = "drag"
    SCROLL = "scroll"
    HOTKEY = "hotkey"
    TYPE = "type"
    WAIT = "wait"
    FINISHED = "finished"
    INFEASIBLE = "infeasible"


_KINDS_WITH_A_POINT = frozenset(
    {
        ActionKind.CLICK,
        ActionKind.DOUBLE_CLICK,
        ActionKind.TRIPLE_CLICK,
        ActionKind.RIGHT_CLICK,
        ActionKind.MIDDLE_CLICK,
        ActionKind.MOVE,
        ActionKind.DRAG,
        ActionKind.SCROLL,
    }
)


@dataclass(frozen=True)
class Action:
    """One action. Fields that its kind does not use keep their defaults.

    Coordinates are screen pixels with the origin at the top left. SCROLL turns the wheel at (x, y) by `scroll_x` and
    `scroll_y` notches; positive values scroll right and down. Actions with a point hold `keys` meanwhile. HOTKEY
    presses `keys` in order, holds them for `seconds`, and releases them in reverse order, all of it `repeat` times.
    Keys are named as in `guest.keysyms`, by characters and short names ("ctrl", "enter", "left"). TYPE enters `text` as
    written, newlines as Return. WAIT waits for `seconds`. FINISHED and INFEASIBLE end the episode without touching the
    desktop.
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
    repeat: int = 1

    @property
    def has_point(self) -> bool:
        """Whether this action moves the pointer to a point."""
        return self.kind in _KINDS_WITH_A_POINT

    @property
    def ends_episode(self) -> bool:
        """Whether this action ends the episode."""
        return self.kind in (ActionKind.FINISHED, ActionKind.INFEASIBLE)

    def to_record(self) -> dict[str, Any]:
        """Return the fields as JSON values without those that have their defaults."""
        empty = Action(self.kind)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if name == "kind" or value != getattr(empty, name)
        }
