"""The action language of Anthropic's computer-use tool: a thought, and one content block of the Messages API as JSON.

    The form is filled in, so I press Submit.
    {"type": "tool_use", "name": "computer", "input": {"action": "left_click", "coordinate": [412, 230]}}

A block of type "text" ends the task with an answer. A call of `report_infeasible` ends it as infeasible.

Format: platform.claude.com/docs/en/agents-and-tools/tool-use/computer-use-tool, and the types of the package
`anthropic`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.agent.action_language import FormatError, InitialPrompt, PolicyResponse, ToolApiLanguage
from deskrl.actor.agent.call_scanner import shorten
from deskrl.actor.agent.tool_call_arguments import (
    MAX_REPEATS,
    at_point,
    check_arguments,
    check_keys,
    check_number,
    check_point,
    check_seconds,
    check_text,
    check_typed_text,
    notches,
    parse_chord,
    scroll_vector,
    split_last_object,
)
from deskrl.core.config import AgentConfig, Section

ToolType = Literal["computer_20250124", "computer_20251124", "computer_toolset_20260801"]
INFEASIBLE_TOOL = {
    "name": "report_infeasible",
    "description": "Ends the task because it cannot be done on this computer.",
    "input_schema": {"type": "object", "properties": {}},
}
"""Tool that declares a task infeasible, which the computer-use tool has no action for."""
BETA_HEADERS = {"computer_20250124": "computer-use-2025-01-24", "computer_20251124": "computer-use-2025-11-24"}
"""Value of the header `anthropic-beta` that a type of tool requires."""
_POINTERS = {
    "left_click": ActionKind.CLICK,
    "double_click": ActionKind.DOUBLE_CLICK,
    "triple_click": ActionKind.TRIPLE_CLICK,
    "right_click": ActionKind.RIGHT_CLICK,
    "middle_click": ActionKind.MIDDLE_CLICK,
    "mouse_move": ActionKind.MOVE,
}
_NAMES = {kind: name for name, kind in _POINTERS.items()}
UNAVAILABLE = {
    "left_mouse_down": "buttons are not held between actions; use left_click_drag",
    "left_mouse_up": "buttons are not held between actions; use left_click_drag",
    "cursor_position": "the desktop does not report the position of the pointer",
    "zoom": "screenshots have one size",
}
"""Reasons of rejection of the actions that desktops do not have."""
_SYSTEM = """\
You operate a Linux desktop to do the user's task. You see a screenshot after each action.

Do one action at a time. The actions left_mouse_down, left_mouse_up, cursor_position and zoom are not available. If \
the task cannot be done, call report_infeasible. If it is done, answer without a tool call. Write in {language}."""
_TEXT_FORM = """

Write each response in two parts: why you do the next action, and on the last line one JSON object:
- {"type": "tool_use", "name": "computer", "input": {"action": NAME, ...}}, with points in pixels of the screenshot. \
Actions with their arguments:
  left_click, right_click, middle_click, double_click, triple_click: coordinate [x, y], text (keys to hold, optional)
  mouse_move: coordinate
  left_click_drag: start_coordinate, coordinate
  scroll: coordinate, scroll_direction (up, down, left, right), scroll_amount (notches)
  key: text, such as "ctrl+s"
  hold_key: text, duration (seconds)
  type: text
  wait: duration (seconds)
  screenshot: none
- {"type": "tool_use", "name": "report_infeasible", "input": {}}
- {"type": "text", "text": ANSWER}, if the task is done"""


class AnthropicComputerUse(ToolApiLanguage):
    """Anthropic's computer-use tool: coordinates in pixels of the screenshot as it is sent."""

    title = "Anthropic computer use"
    has_relative_coordinates = False
    api = "anthropic_messages"

    class Options(Section):
        """Keys of `agent.action_language_options`."""

        tool: ToolType = "computer_20251124"
        """Version of the tool that is offered to a server of Anthropic's Messages API; the model determines it."""

    def initial_prompt(self, config: AgentConfig, instruction: str) -> InitialPrompt:
        """Return the instructions, and the task."""
        return InitialPrompt(_SYSTEM.format(language=config.language) + _TEXT_FORM, instruction)

    def api_instructions(self, config: AgentConfig) -> str:
        """Return the system prompt for the Messages API, which describes the tools itself."""
        return _SYSTEM.format(language=config.language)

    def tools(self, width: int, height: int) -> list[dict[str, Any]]:
        """Return the definitions of the tools for the Messages API, for screenshots of this size in pixels."""
        kind: ToolType = self.options.tool
        if kind == "computer_toolset_20260801":
            return [{"type": kind, "configs": {name: {"enabled": False} for name in UNAVAILABLE}}, INFEASIBLE_TOOL]
        size = {"display_width_px": width, "display_height_px": height}
        return [{"type": kind, "name": "computer", **size}, INFEASIBLE_TOOL]

    def parse(self, text: str, coordinate_range: tuple[int, int]) -> PolicyResponse:
        """Parse one content block on the last line of a response."""
        thought, block = split_last_object(text, ("tool_use", "text"))
        if block.get("type") == "text":
            answer = check_text(block.get("text"), "text", "the answer")
            return PolicyResponse(thought, Action(ActionKind.FINISHED, text=answer))
        if block.get("type") != "tool_use":
            raise FormatError("the last line of the response is neither a tool_use block nor a text block")
        return replace(_read_call(block.get("name"), block.get("input")), thought=thought)

    def render(self, response: PolicyResponse) -> str:
        """Return the thought, and the content block of an action."""
        return f"{response.thought}\n{json.dumps(_render_block(response.action), ensure_ascii=False)}"


def _read_call(tool: Any, arguments: Any) -> PolicyResponse:
    """Return the action of a call: of the tool `computer`, or of a member of the toolset, whose name is the action."""
    if not isinstance(tool, str) or not isinstance(arguments, dict):
        raise FormatError("the tool call has no name or no input")
    if tool == INFEASIBLE_TOOL["name"]:
        return PolicyResponse("", Action(ActionKind.INFEASIBLE))
    arguments = dict(arguments)
    name = arguments.pop("action", None) if tool == "computer" else tool
    if not isinstance(name, str):
        raise FormatError("the tool call has no action")
    if name in UNAVAILABLE:
        raise FormatError(f"{name}: {UNAVAILABLE[name]}")
    if name in _POINTERS:
        check_arguments(arguments, ("coordinate", "text"), name)
        action = Action(_POINTERS[name], keys=_modifiers(arguments, name))
        return at_point(action, arguments.get("coordinate"), "coordinate", name)
    if name not in _READERS:
        raise FormatError(f"unknown action {shorten(name)}")
    return _READERS[name](arguments)


def _modifiers(arguments: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Return the keys that are held during an action of the mouse."""
    written = arguments.get("text")
    return () if written in (None, "") else check_keys(written, "text", name)


def _read_drag(arguments: Mapping[str, Any]) -> PolicyResponse:
    name = "left_click_drag"
    check_arguments(arguments, ("coordinate", "start_coordinate", "text"), name)
    end_x, end_y = check_point(arguments.get("coordinate"), "coordinate", name)
    action = Action(ActionKind.DRAG, end_x=end_x, end_y=end_y, keys=_modifiers(arguments, name))
    return at_point(action, arguments.get("start_coordinate"), "start_coordinate", name)


def _read_scroll(arguments: Mapping[str, Any]) -> PolicyResponse:
    name = "scroll"
    check_arguments(arguments, ("coordinate", "scroll_direction", "scroll_amount", "text"), name)
    amount = check_number(arguments.get("scroll_amount"), "scroll_amount", name)
    if amount <= 0:
        raise FormatError("scroll: scroll_amount is not positive")
    right, down = scroll_vector(arguments.get("scroll_direction"), notches(amount), name)
    action = Action(ActionKind.SCROLL, scroll_x=right, scroll_y=down, keys=_modifiers(arguments, name))
    return at_point(action, arguments.get("coordinate"), "coordinate", name)


def _read_key(arguments: Mapping[str, Any]) -> PolicyResponse:
    """Return the presses of one combination of keys; xdotool's syntax separates several by spaces."""
    check_arguments(arguments, ("text", "repeat"), "key")
    chords = check_text(arguments.get("text"), "text", "key").split()[: MAX_REPEATS + 1]
    if len(set(chords)) > 1:
        raise FormatError("key: several different combinations of keys are more than one action")
    keys = parse_chord(chords[0], "key") if chords else check_keys(arguments.get("text"), "text", "key")
    repeat = 1 if arguments.get("repeat") is None else round(check_number(arguments["repeat"], "repeat", "key"))
    if repeat < 1:
        raise FormatError("key: repeat is less than 1")
    num_presses = min(repeat * max(1, len(chords)), MAX_REPEATS)
    return PolicyResponse("", Action(ActionKind.HOTKEY, keys=keys, repeat=num_presses))


def _read_hold_key(arguments: Mapping[str, Any]) -> PolicyResponse:
    check_arguments(arguments, ("text", "duration"), "hold_key")
    keys = check_keys(arguments.get("text"), "text", "hold_key")
    seconds = check_seconds(arguments.get("duration"), "duration", "hold_key")
    return PolicyResponse("", Action(ActionKind.HOTKEY, keys=keys, seconds=seconds))


def _read_type(arguments: Mapping[str, Any]) -> PolicyResponse:
    check_arguments(arguments, ("text",), "type")
    return PolicyResponse("", Action(ActionKind.TYPE, text=check_typed_text(arguments.get("text"), "text", "type")))


def _read_wait(arguments: Mapping[str, Any]) -> PolicyResponse:
    check_arguments(arguments, ("duration",), "wait")
    seconds = check_seconds(arguments.get("duration"), "duration", "wait")
    return PolicyResponse("", Action(ActionKind.WAIT, seconds=seconds))


def _read_screenshot(arguments: Mapping[str, Any]) -> PolicyResponse:
    """Return a pause of no length: every action is followed by a screenshot."""
    check_arguments(arguments, (), "screenshot")
    return PolicyResponse("", Action(ActionKind.WAIT))


_READERS: dict[str, Callable[[Mapping[str, Any]], PolicyResponse]] = {
    "left_click_drag": _read_drag,
    "scroll": _read_scroll,
    "key": _read_key,
    "hold_key": _read_hold_key,
    "type": _read_type,
    "wait": _read_wait,
    "screenshot": _read_screenshot,
}


def _render_block(action: Action) -> dict[str, Any]:
    """Return the content block of an action."""
    if action.kind is ActionKind.FINISHED:
        return {"type": "text", "text": action.text}
    if action.kind is ActionKind.INFEASIBLE:
        return {"type": "tool_use", "name": INFEASIBLE_TOOL["name"], "input": {}}
    return {"type": "tool_use", "name": "computer", "input": _render_input(action)}


def _render_input(action: Action) -> dict[str, Any]:
    here = [action.x, action.y]
    keys = "+".join(action.keys)
    held = {"text": keys} if keys and action.has_point else {}
    if action.kind in _NAMES:
        return {"action": _NAMES[action.kind], "coordinate": here, **held}
    match action.kind:
        case ActionKind.DRAG:
            end = [action.end_x, action.end_y]
            return {"action": "left_click_drag", "start_coordinate": here, "coordinate": end, **held}
        case ActionKind.SCROLL:
            amount = abs(action.scroll_x or action.scroll_y)
            negative, positive = ("left", "right") if action.scroll_x else ("up", "down")
            direction = positive if max(action.scroll_x, action.scroll_y) > 0 else negative
            scroll = {"scroll_direction": direction, "scroll_amount": amount}
            return {"action": "scroll", "coordinate": here, **scroll, **held}
        case ActionKind.HOTKEY if action.seconds:
            return {"action": "hold_key", "text": keys, "duration": action.seconds}
        case ActionKind.HOTKEY:
            return {"action": "key", "text": " ".join([keys] * action.repeat)}
        case ActionKind.TYPE:
            return {"action": "type", "text": action.text}
    return {"action": "wait", "duration": action.seconds}
