"""The action language of OpenAI's computer-use tool: a thought, and one output item of the Responses API as JSON.

    The form is filled in, so I press Submit.
    {"type": "computer_call", "action": {"type": "click", "button": "left", "x": 412, "y": 230}}

An item of type "message" ends the task with an answer. A call of the function `report_infeasible` ends it as
infeasible.

Format: developers.openai.com/api/docs/guides/tools-computer-use, and the types of the package `openai`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.agent.action_language import FormatError, InitialPrompt, PolicyResponse, ToolApiLanguage
from deskrl.actor.agent.call_scanner import shorten
from deskrl.actor.agent.tool_call_arguments import (
    check_arguments,
    check_keys,
    check_number,
    check_point,
    check_text,
    check_typed_text,
    notches,
    split_last_object,
)
from deskrl.core.config import AgentConfig, Section

INFEASIBLE_TOOL = {
    "type": "function",
    "name": "report_infeasible",
    "description": "Ends the task because it cannot be done on this computer.",
    "parameters": {"type": "object", "properties": {}, "required": [], "additionalProperties": False},
    "strict": True,
}
"""Tool that declares a task infeasible, which the computer-use tool has no action for."""
_WAIT_S = 2.0
_PIXELS_PER_NOTCH = 100
_STRAIGHT_PIXELS = 5.0
_BUTTONS = {"left": ActionKind.CLICK, "right": ActionKind.RIGHT_CLICK, "wheel": ActionKind.MIDDLE_CLICK}
_SYSTEM = """\
You operate a Linux desktop to do the user's task. You see a screenshot after each action.

Do not ask for confirmation. If the task cannot be done, call report_infeasible. If it is done, answer without a tool \
call. Write in {language}."""
_TEXT_FORM = """

Write each response in two parts: why you do the next action, and on the last line one JSON object:
- {"type": "computer_call", "action": {"type": NAME, ...}}, with points in pixels of the screenshot. Actions with \
their arguments:
  click: button (left, right, wheel), x, y, keys (list of keys to hold, optional)
  double_click, move: x, y, keys (optional)
  drag: path (list of the two points {"x": x, "y": y}), keys (optional)
  scroll: x, y, scroll_x, scroll_y (pixels to the right and down), keys (optional)
  keypress: keys, such as ["ctrl", "s"]
  type: text
  wait, screenshot: none
- {"type": "function_call", "name": "report_infeasible", "arguments": "{}"}
- {"type": "message", "content": [{"type": "output_text", "text": ANSWER}]}, if the task is done"""


class OpenAIComputerUse(ToolApiLanguage):
    """OpenAI's computer-use tool: coordinates in pixels of the screenshot as it is sent."""

    title = "OpenAI computer use"
    has_relative_coordinates = False
    api = "openai_responses"

    class Options(Section):
        """Keys of `agent.action_language_options`."""

        tool: Literal["computer", "computer_use_preview"] = "computer"
        """Tool that is offered to a server of OpenAI's Responses API; the model determines it."""
        safety_checks: Literal["refuse", "acknowledge"] = "refuse"
        """Actions for which the server requires the confirmation of a person (`pending_safety_checks`). `refuse`: end
        the episode with a format error that names the check; `acknowledge`: confirm and execute them, for desktops
        that nothing outside depends on."""

    def initial_prompt(self, config: AgentConfig, instruction: str) -> InitialPrompt:
        """Return the instructions, and the task."""
        return InitialPrompt(_SYSTEM.format(language=config.language) + _TEXT_FORM, instruction)

    def api_instructions(self, config: AgentConfig) -> str:
        """Return the instructions for the Responses API, which describes the tools itself."""
        return _SYSTEM.format(language=config.language)

    def tools(self, width: int, height: int) -> list[dict[str, Any]]:
        """Return the definitions of the tools for the Responses API, for screenshots of this size in pixels."""
        computer: dict[str, Any] = {"type": self.options.tool}
        if self.options.tool == "computer_use_preview":
            computer |= {"display_width": width, "display_height": height, "environment": "linux"}
        return [computer, INFEASIBLE_TOOL]

    def parse(self, text: str, coordinate_range: tuple[int, int]) -> PolicyResponse:
        """Parse one output item, or a bare action, on the last line of a response."""
        thought, item = split_last_object(text, ("computer_call", "function_call", "message", *_READERS))
        match item.get("type"):
            case "message":
                return PolicyResponse(thought, Action(ActionKind.FINISHED, text=_message_text(item.get("content"))))
            case "function_call" if item.get("name") == INFEASIBLE_TOOL["name"]:
                return PolicyResponse(thought, Action(ActionKind.INFEASIBLE))
            case "function_call":
                raise FormatError("unknown function of a function_call")
            case "computer_call":
                self._check_safety(item.get("pending_safety_checks"))
                return PolicyResponse(thought, _read_action(_only_action(item)))
        return PolicyResponse(thought, _read_action(item))

    def render(self, response: PolicyResponse) -> str:
        """Return the thought, and the output item of an action."""
        return f"{response.thought}\n{json.dumps(_render_item(response.action), ensure_ascii=False)}"

    def _check_safety(self, checks: Any) -> None:
        """Raise FormatError if the action requires a confirmation that the options do not give."""
        if not checks or self.options.safety_checks == "acknowledge":
            return
        first = checks[0] if isinstance(checks, list) and isinstance(checks[0], dict) else {}
        reason = shorten(" ".join(str(first[key]) for key in ("code", "message") if isinstance(first.get(key), str)))
        raise FormatError(
            f"the server requires a person to confirm {reason}; "
            "agent.action_language_options.safety_checks = acknowledge confirms it"
        )


def _only_action(item: Mapping[str, Any]) -> dict[str, Any]:
    """Return the only action of a call, in either field of the API."""
    listed = item.get("actions")
    found = listed if isinstance(listed, list) and listed else [item.get("action")]
    if len(found) != 1:
        raise FormatError("the call contains more than one action")
    if not isinstance(found[0], dict):
        raise FormatError("the call has no action")
    return found[0]


def _message_text(content: Any) -> str:
    """Return the text of a message."""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text", part.get("refusal")) if isinstance(part, dict) else part for part in parts]
    return "\n".join(check_text(text, "text", "the answer") for text in texts)


def _read_action(action: Mapping[str, Any]) -> Action:
    name = action.get("type")
    if not isinstance(name, str) or name not in _READERS:
        raise FormatError(f"unknown action {shorten(name) if isinstance(name, str) else 'without a type'}")
    return _READERS[name](action)


def _held(action: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Return the keys that are held during an action of the mouse."""
    return check_keys(action["keys"], "keys", name) if action.get("keys") else ()


def _point(value: Any, name: str) -> tuple[int, int]:
    if not isinstance(value, dict):
        raise FormatError(f"{name}: a point is not an object with x and y")
    return check_point([value.get("x"), value.get("y")], "(x, y)", name)


def _read_click(action: Mapping[str, Any]) -> Action:
    check_arguments(action, ("type", "button", "x", "y", "keys"), "click")
    button = action.get("button", "left")
    if not isinstance(button, str) or button not in _BUTTONS:
        raise FormatError("click: button is not one of left, right, wheel; the mouse of the desktop has no other")
    return Action(_BUTTONS[button], *_point(action, "click"), keys=_held(action, "click"))


def _read_at_point(action: Mapping[str, Any]) -> Action:
    name = action["type"]
    check_arguments(action, ("type", "x", "y", "keys"), name)
    kind = ActionKind.MOVE if name == "move" else ActionKind.DOUBLE_CLICK
    return Action(kind, *_point(action, name), keys=_held(action, name))


def _read_drag(action: Mapping[str, Any]) -> Action:
    """Return a drag from the first to the last point, if the path is straight."""
    check_arguments(action, ("type", "path", "keys"), "drag")
    path = action.get("path")
    if not isinstance(path, list) or len(path) < 2:
        raise FormatError("drag: path is not a list of at least two points")
    points = [
        _point(point, "drag") if isinstance(point, dict) else check_point(point, "path", "drag") for point in path
    ]
    (x, y), (end_x, end_y) = points[0], points[-1]
    length = math.hypot(end_x - x, end_y - y) or 1.0
    for px, py in points[1:-1]:
        along = ((px - x) * (end_x - x) + (py - y) * (end_y - y)) / length
        beside = abs((px - x) * (end_y - y) - (py - y) * (end_x - x)) / length
        if beside > _STRAIGHT_PIXELS or not -_STRAIGHT_PIXELS <= along <= length + _STRAIGHT_PIXELS:
            raise FormatError("drag: the path is not straight; a drag of the desktop has two points")
    return Action(ActionKind.DRAG, x, y, end_x, end_y, keys=_held(action, "drag"))


def _read_scroll(action: Mapping[str, Any]) -> Action:
    check_arguments(action, ("type", "x", "y", "scroll_x", "scroll_y", "keys"), "scroll")
    right, down = (
        notches(check_number(action.get(name) or 0, name, "scroll"), _PIXELS_PER_NOTCH)
        for name in ("scroll_x", "scroll_y")
    )
    if right == down == 0:
        raise FormatError("scroll: scroll_x and scroll_y are 0")
    x, y = _point(action, "scroll")
    return Action(ActionKind.SCROLL, x, y, scroll_x=right, scroll_y=down, keys=_held(action, "scroll"))


def _read_keypress(action: Mapping[str, Any]) -> Action:
    check_arguments(action, ("type", "keys"), "keypress")
    return Action(ActionKind.HOTKEY, keys=check_keys(action.get("keys"), "keys", "keypress"))


def _read_type(action: Mapping[str, Any]) -> Action:
    check_arguments(action, ("type", "text"), "type")
    return Action(ActionKind.TYPE, text=check_typed_text(action.get("text"), "text", "type"))


def _read_pause(action: Mapping[str, Any]) -> Action:
    """Return a pause; one of no length for a screenshot, because every action is followed by one."""
    name = action["type"]
    check_arguments(action, ("type",), name)
    return Action(ActionKind.WAIT, seconds=_WAIT_S if name == "wait" else 0.0)


_READERS: dict[str, Callable[[Mapping[str, Any]], Action]] = {
    "click": _read_click,
    "double_click": _read_at_point,
    "move": _read_at_point,
    "drag": _read_drag,
    "scroll": _read_scroll,
    "keypress": _read_keypress,
    "type": _read_type,
    "wait": _read_pause,
    "screenshot": _read_pause,
}


def _render_item(action: Action) -> dict[str, Any]:
    """Return the output item of an action; raises ValueError if there is none."""
    if action.kind is ActionKind.FINISHED:
        return {"type": "message", "content": [{"type": "output_text", "text": action.text}]}
    if action.kind is ActionKind.INFEASIBLE:
        return {"type": "function_call", "name": INFEASIBLE_TOOL["name"], "arguments": "{}"}
    return {"type": "computer_call", "action": _render_action(action)}


def _render_action(action: Action) -> dict[str, Any]:
    here = {"x": action.x, "y": action.y}
    held = {"keys": list(action.keys)} if action.keys else {}
    for button, kind in _BUTTONS.items():
        if action.kind is kind:
            return {"type": "click", "button": button, **here, **held}
    match action.kind:
        case ActionKind.DOUBLE_CLICK | ActionKind.MOVE:
            return {"type": action.kind.value, **here, **held}
        case ActionKind.DRAG:
            return {"type": "drag", "path": [here, {"x": action.end_x, "y": action.end_y}], **held}
        case ActionKind.SCROLL:
            distances = {"scroll_x": action.scroll_x, "scroll_y": action.scroll_y}
            pixels = {name: notch * _PIXELS_PER_NOTCH for name, notch in distances.items()}
            return {"type": "scroll", **here, **pixels, **held}
        case ActionKind.HOTKEY if action.repeat == 1 and not action.seconds:
            return {"type": "keypress", **held}
        case ActionKind.TYPE:
            return {"type": "type", "text": action.text}
        case ActionKind.WAIT:
            return {"type": "wait" if action.seconds else "screenshot"}
    raise ValueError(f"OpenAI's tool has no {action.kind} of this form")
