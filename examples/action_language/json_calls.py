"""An action language of JSON tool calls, with coordinates in thousandths of the screenshot.

    {"thought": "The form is filled in, so I press Submit.", "tool": "click", "x": 412, "y": 230}

Select it with `agent.action_language = "json_calls:JsonCalls"`.
"""

from __future__ import annotations

import json
from typing import Any

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.agent.action_language import ActionLanguage, FormatError, InitialPrompt, PolicyResponse
from deskrl.actor.guest.keysyms import key_name
from deskrl.core.config import AgentConfig, Section

_POINT = ("x", "y")
_ARGUMENTS = {
    ActionKind.CLICK: _POINT,
    ActionKind.DOUBLE_CLICK: _POINT,
    ActionKind.TRIPLE_CLICK: _POINT,
    ActionKind.RIGHT_CLICK: _POINT,
    ActionKind.MIDDLE_CLICK: _POINT,
    ActionKind.MOVE: _POINT,
    ActionKind.DRAG: (*_POINT, "end_x", "end_y"),
    ActionKind.SCROLL: (*_POINT, "scroll_x", "scroll_y"),
    ActionKind.HOTKEY: ("keys",),
    ActionKind.TYPE: ("text",),
    ActionKind.WAIT: (),
    ActionKind.FINISHED: ("text",),
    ActionKind.INFEASIBLE: (),
}
_MAX_NOTCHES = 100
_PROMPT = """\
Use the computer to do the task below. After each screenshot, answer with one JSON object:
{"thought": "why", "tool": "name", ...}

Tools with their arguments:
%s

Points are in thousandths of the screenshot, scroll_x and scroll_y in notches to the right and down, keys in a list.

Task: """


class JsonCalls(ActionLanguage):
    """One JSON object per response; the tools have the names of deskrl's actions."""

    title = "JSON calls"

    class Options(Section):
        """Keys of `agent.action_language_options`."""

        wait_s: float = 2.0
        """Duration of the tool `wait` in seconds."""

    def initial_prompt(self, config: AgentConfig, instruction: str) -> InitialPrompt:
        """Return the list of the tools and the task."""
        tools = "\n".join(f"- {kind}: {', '.join(names) or 'none'}" for kind, names in _ARGUMENTS.items())
        return InitialPrompt("You operate a computer.", _PROMPT % tools + instruction)

    def parse(self, text: str, coordinate_range: tuple[int, int]) -> PolicyResponse:
        """Parse one JSON object; unknown and missing arguments are errors."""
        try:
            call: Any = json.loads(text)
        except (ValueError, RecursionError):
            raise FormatError("the response is not one JSON object") from None
        kind = next((it for it in _ARGUMENTS if isinstance(call, dict) and call.get("tool") == it), None)
        if kind is None or call.keys() != {"thought", "tool", *_ARGUMENTS[kind]}:
            raise FormatError("the response is not a call of a known tool with its arguments")
        values = {name: _check(name, call[name]) for name in ("thought", *_ARGUMENTS[kind])}
        thought = values.pop("thought")
        return PolicyResponse(thought, Action(kind, **values, seconds=self.options.wait_s * (kind == ActionKind.WAIT)))

    def render(self, response: PolicyResponse) -> str:
        """Return the JSON object."""
        action = response.action
        arguments = {name: getattr(action, name) for name in _ARGUMENTS[action.kind]}
        return json.dumps({"thought": response.thought, "tool": action.kind, **arguments}, ensure_ascii=False)


def _check(name: str, value: Any) -> Any:
    """Return the value of an argument; raises FormatError if it is not valid."""
    if name in ("thought", "text"):
        is_valid = isinstance(value, str) and all(it.isprintable() or it in "\n\t" for it in value)
    elif name == "keys":
        is_valid = isinstance(value, list) and 0 < len(value) < 10 and all(isinstance(it, str) for it in value)
        value = tuple(key_name(it) for it in value) if is_valid else ()
        is_valid = is_valid and None not in value
    else:
        lowest, highest = (-_MAX_NOTCHES, _MAX_NOTCHES) if name.startswith("scroll") else (0, 1000)
        is_valid = type(value) is int and lowest <= value <= highest  # a bool is an int too
    if not is_valid:
        raise FormatError(f"{name} has no valid value")
    return value
