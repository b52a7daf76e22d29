"""The action languages of Qwen3-VL and Qwen2.5-VL: calls of the tool `computer_use`.

    The form is filled in, so I press Submit.
    <tool_call>
    {"name": "computer_use", "arguments": {"action": "left_click", "coordinate": [412, 230]}}
    </tool_call>

Format: cookbooks/utils/agent_function_call.py and the chat template of Qwen3-VL.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.agent.action_language import ActionLanguage, FormatError, InitialPrompt, PolicyResponse
from deskrl.actor.agent.call_scanner import shorten
from deskrl.actor.agent.tool_call_arguments import (
    at_point,
    check_arguments,
    check_keys,
    check_number,
    check_point,
    check_seconds,
    check_text,
    check_typed_text,
    decode_object,
    find_object,
    notches,
)
from deskrl.core.config import AgentConfig
from deskrl.core.prompt_rendering import ImageSizing

_SIZING = ImageSizing(patch_size=14, merge_size=2, min_pixels=4 * 28**2, max_pixels=16384 * 28**2)
"""Image scaling of the processors of Qwen2.5-VL."""
_TOOL = "computer_use"
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_END_OF_THINKING = "</think>"
_WAIT_S = 2.0
_PIXELS_PER_NOTCH = 100
_MOST_NOTCHES = 20
"""Largest value of `pixels` that is a number of notches. Models write both "pixels": -5 and "pixels": -500; OSWorld's
agent for Qwen3-VL turns the wheel by this number, and others divide it by a hundred."""

_POINTERS = {
    "left_click": ActionKind.CLICK,
    "click": ActionKind.CLICK,
    "double_click": ActionKind.DOUBLE_CLICK,
    "triple_click": ActionKind.TRIPLE_CLICK,
    "right_click": ActionKind.RIGHT_CLICK,
    "middle_click": ActionKind.MIDDLE_CLICK,
    "mouse_move": ActionKind.MOVE,
}
_NAMES = {kind: name for name, kind in _POINTERS.items() if name != "click"}
_PARAMETERS: dict[str, Any] = {
    "action": {
        "type": "string",
        "enum": [
            *_NAMES.values(),
            "left_click_drag",
            "scroll",
            "hscroll",
            "key",
            "type",
            "wait",
            "answer",
            "terminate",
        ],
        "description": "What to do. left_click_drag presses the left button at start_coordinate, or where the pointer "
        "is, and releases it at coordinate. key presses keys in order and releases them in reverse order. answer ends "
        "the task with the answer to a question, and terminate ends it without.",
    },
    "coordinate": {"type": "array", "description": "Point [x, y] of an action of the mouse."},
    "start_coordinate": {"type": "array", "description": "Point [x, y] at which left_click_drag starts."},
    "pixels": {"type": "number", "description": "Distance of scroll (positive: up) or hscroll (positive: right)."},
    "keys": {"type": "array", "description": "Names of the keys of key."},
    "text": {"type": "string", "description": "Text of type or answer."},
    "time": {"type": "number", "description": "Seconds of wait."},
    "status": {
        "type": "string",
        "enum": ["success", "failure"],
        "description": "Status of terminate: failure means that the task cannot be done.",
    },
}
_SYSTEM = """\
You are a helpful assistant.

# Tools

You call functions to do the user's task. Their signatures are within <tools></tools> XML tags:
<tools>
{tools}
</tools>

Write a function call as a JSON object with the name of the function and its arguments within <tool_call></tool_call> \
XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>

# Response format

Each response has two parts: one sentence in {language} that says why and what you do next, and one function call."""


class _QwenComputerUse(ActionLanguage):
    """What both languages have in common."""

    _screen = ""
    """Description of the coordinates."""

    def initial_prompt(self, config: AgentConfig, instruction: str) -> InitialPrompt:
        """Return the signature of the tool, and the task."""
        tool = {
            "type": "function",
            "function": {
                "name": _TOOL,
                "description": f"Controls a computer with mouse and keyboard. {self._screen}",
                "parameters": {"type": "object", "properties": _PARAMETERS, "required": ["action"]},
            },
        }
        return InitialPrompt(_SYSTEM.format(tools=json.dumps(tool), language=config.language), instruction)

    def parse(self, text: str, coordinate_range: tuple[int, int]) -> PolicyResponse:
        """Parse one call of `computer_use`, with or without the tags around it."""
        thought, arguments = _split_response(text)
        name = arguments.get("action")
        if not isinstance(name, str):
            raise FormatError("the tool call has no action")
        read = _READERS.get(name)
        if read is None:
            raise FormatError(f"unknown action {shorten(name)}")
        return replace(read(arguments), thought=thought)

    def render(self, response: PolicyResponse) -> str:
        """Return the thought and the call between its tags."""
        call = {"name": _TOOL, "arguments": _render_arguments(response.action)}
        return f"{response.thought}\n{_OPEN}\n{json.dumps(call, ensure_ascii=False)}\n{_CLOSE}"


class Qwen3VLComputerUse(_QwenComputerUse):
    """Qwen3-VL: coordinates in thousandths."""

    title = "Qwen3-VL computer_use"
    architectures = ("qwen3_vl",)
    _screen = "The screen is 1000 x 1000: points are in thousandths of its width and height."


class Qwen25VLComputerUse(_QwenComputerUse):
    """Qwen2.5-VL: coordinates in pixels of the screenshot as the model sees it."""

    title = "Qwen2.5-VL computer_use"
    architectures = ("qwen2_5_vl",)
    has_relative_coordinates = False
    _screen = "Points are in pixels of the screenshot."

    def coordinate_range(self, width: int, height: int) -> tuple[int, int]:
        """Return the size to which the image processor scales a screenshot."""
        return _SIZING.scaled_size(width, height)


def _split_response(text: str) -> tuple[str, dict[str, Any]]:
    """Return the thought and the arguments of the only call of a response."""
    thinking, text = _split_thinking(text)
    start = text.find(_OPEN)
    position = find_object(text) if start < 0 else start + len(_OPEN)
    if position is None:
        raise FormatError("the response contains no tool call")
    thought = text[: position if start < 0 else start].strip() or thinking
    body = position + len(text[position:]) - len(text[position:].lstrip())
    if text.startswith("<function", body):
        raise FormatError("the tool call is written in XML, not in JSON")
    call, end = decode_object(text, body)
    if text.find(_OPEN, end) >= 0 or find_object(text, end) is not None:
        raise FormatError("the response contains more than one tool call")
    if call.get("name") != _TOOL:
        raise FormatError(f"the tool call is not a call of {_TOOL}")
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        arguments, _ = decode_object(arguments)
    if not isinstance(arguments, dict):
        raise FormatError("the tool call has no arguments")
    return thought, arguments


def _split_thinking(text: str) -> tuple[str, str]:
    """Return the reasoning before a response and the rest. Its opening tag may be part of the prompt."""
    start, end = text.find(_OPEN), text.find(_END_OF_THINKING)
    is_opened = text.lstrip().startswith("<think>")
    if end < 0 or (0 <= start < end and not is_opened):
        return "", text
    return text[:end].replace("<think>", "", 1).strip(), text[end + len(_END_OF_THINKING) :]


def _read_pointer(arguments: Mapping[str, Any]) -> PolicyResponse:
    name = arguments["action"]
    check_arguments(arguments, ("action", "coordinate"), name)
    return at_point(Action(_POINTERS[name]), arguments.get("coordinate"), "coordinate", name)


def _read_drag(arguments: Mapping[str, Any]) -> PolicyResponse:
    name = "left_click_drag"
    check_arguments(arguments, ("action", "coordinate", "start_coordinate"), name)
    end_x, end_y = check_point(arguments.get("coordinate"), "coordinate", name)
    action = Action(ActionKind.DRAG, end_x=end_x, end_y=end_y)
    return at_point(action, arguments.get("start_coordinate"), "start_coordinate", name)


def _read_scroll(arguments: Mapping[str, Any]) -> PolicyResponse:
    name = arguments["action"]
    check_arguments(arguments, ("action", "coordinate", "pixels"), name)
    pixels = check_number(arguments.get("pixels"), "pixels", name)
    distance = notches(pixels, 1 if abs(pixels) <= _MOST_NOTCHES else _PIXELS_PER_NOTCH)
    if distance == 0:
        raise FormatError(f"{name}: pixels is 0")
    right, down = (distance, 0) if name == "hscroll" else (0, -distance)
    action = Action(ActionKind.SCROLL, scroll_x=right, scroll_y=down)
    return at_point(action, arguments.get("coordinate"), "coordinate", name)


def _read_key(arguments: Mapping[str, Any]) -> PolicyResponse:
    check_arguments(arguments, ("action", "keys"), "key")
    return PolicyResponse("", Action(ActionKind.HOTKEY, keys=check_keys(arguments.get("keys"), "keys", "key")))


def _read_type(arguments: Mapping[str, Any]) -> PolicyResponse:
    check_arguments(arguments, ("action", "text"), "type")
    return PolicyResponse("", Action(ActionKind.TYPE, text=check_typed_text(arguments.get("text"), "text", "type")))


def _read_wait(arguments: Mapping[str, Any]) -> PolicyResponse:
    check_arguments(arguments, ("action", "time"), "wait")
    time = arguments.get("time")
    seconds = _WAIT_S if time is None else check_seconds(time, "time", "wait")
    return PolicyResponse("", Action(ActionKind.WAIT, seconds=seconds))


def _read_answer(arguments: Mapping[str, Any]) -> PolicyResponse:
    check_arguments(arguments, ("action", "text"), "answer")
    return PolicyResponse("", Action(ActionKind.FINISHED, text=check_text(arguments.get("text"), "text", "answer")))


def _read_terminate(arguments: Mapping[str, Any]) -> PolicyResponse:
    check_arguments(arguments, ("action", "status"), "terminate")
    status = arguments.get("status")
    if status not in ("success", "failure"):
        raise FormatError("terminate: status is neither success nor failure")
    return PolicyResponse("", Action(ActionKind.FINISHED if status == "success" else ActionKind.INFEASIBLE))


_READERS: dict[str, Callable[[Mapping[str, Any]], PolicyResponse]] = {
    **dict.fromkeys(_POINTERS, _read_pointer),
    "left_click_drag": _read_drag,
    "scroll": _read_scroll,
    "hscroll": _read_scroll,
    "key": _read_key,
    "type": _read_type,
    "wait": _read_wait,
    "answer": _read_answer,
    "terminate": _read_terminate,
}


def _render_arguments(action: Action) -> dict[str, Any]:
    """Return the arguments of the call that performs an action; raises ValueError if there is none."""
    here = [action.x, action.y]
    if (action.has_point and action.keys) or action.repeat != 1:
        raise ValueError(f"{_TOOL} cannot hold keys during {action.kind} or repeat it")
    if action.kind in _NAMES:
        return {"action": _NAMES[action.kind], "coordinate": here}
    match action.kind:
        case ActionKind.DRAG:
            end = [action.end_x, action.end_y]
            return {"action": "left_click_drag", "start_coordinate": here, "coordinate": end}
        case ActionKind.SCROLL:
            name, distance = ("hscroll", action.scroll_x) if action.scroll_x else ("scroll", -action.scroll_y)
            scale = 1 if abs(distance) <= _MOST_NOTCHES else _PIXELS_PER_NOTCH
            return {"action": name, "pixels": distance * scale, "coordinate": here}
        case ActionKind.HOTKEY:
            return {"action": "key", "keys": list(action.keys)}
        case ActionKind.TYPE:
            return {"action": "type", "text": action.text}
        case ActionKind.WAIT:
            return {"action": "wait", "time": action.seconds}
        case ActionKind.FINISHED if action.text:
            return {"action": "answer", "text": action.text}
        case ActionKind.FINISHED:
            return {"action": "terminate", "status": "success"}
    return {"action": "terminate", "status": "failure"}
