"""Reader of the pyautogui code that a policy writes: its calls as `Action`, from the syntax tree, without running it.

The code is one action: one call, or one of the sequences that are written as several calls (a drag from another point,
text and Enter, keys held during a call).
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.agent.action_language import FormatError, PolicyResponse
from deskrl.actor.agent.call_scanner import shorten
from deskrl.actor.agent.tool_call_arguments import (
    MAX_REPEATS,
    at_point,
    check_keys,
    check_number,
    check_seconds,
    check_text,
    check_typed_text,
    notches,
)

_DEFAULT_WAIT_S = 5.0
_MAX_CALLS = 20
_MAX_DEPTH = 3
_TOKEN = re.compile(
    r"[ \t\f]++|\r?\n|;|#[^\n]*+"
    r"|[uU]?(?:'''(?>(?:\\.|[^\\'\0]|'(?!''))*)'''|\"\"\"(?>(?:\\.|[^\\\"\0]|\"(?!\"\"))*)\"\"\")"
    r"|[uUrR]?(?:'(?>(?:\\[^\0]|[^'\\\n\0])*)'|\"(?>(?:\\[^\0]|[^\"\\\n\0])*)\")"
    r"|[A-Za-z_]\w*+(?!['\"])|[-+]?(?:\d++(?:\.\d*+)?|\.\d++)|[.,=]|(?P<open>[(\[])|(?P<close>[)\]])",
    re.DOTALL,
)
"""Tokens of calls with constant arguments. Other code is not given to Python's parser, which takes more than linear
time or ends the process on some of it."""
_MODULES = ("pyautogui", "computer", "time")

_Arguments = dict[str, Any]
_PARAMETERS = {
    "pyautogui.click": ("x", "y", "clicks", "interval", "button", "duration"),
    "pyautogui.leftClick": ("x", "y", "interval", "duration"),
    "pyautogui.rightClick": ("x", "y", "interval", "duration"),
    "pyautogui.middleClick": ("x", "y", "interval", "duration"),
    "pyautogui.doubleClick": ("x", "y", "interval", "button", "duration"),
    "pyautogui.tripleClick": ("x", "y", "interval", "button", "duration"),
    "pyautogui.moveTo": ("x", "y", "duration", "tween"),
    "pyautogui.dragTo": ("x", "y", "duration", "tween", "button", "mouseDownUp"),
    "pyautogui.scroll": ("clicks", "x", "y"),
    "pyautogui.vscroll": ("clicks", "x", "y"),
    "pyautogui.hscroll": ("clicks", "x", "y"),
    "pyautogui.write": ("message", "interval"),
    "pyautogui.typewrite": ("message", "interval"),
    "pyautogui.press": ("keys", "presses", "interval"),
    "pyautogui.keyDown": ("key",),
    "pyautogui.keyUp": ("key",),
    "pyautogui.sleep": ("seconds",),
    "time.sleep": ("seconds",),
    "computer.triple_click": ("x", "y"),
    "computer.tripleClick": ("x", "y"),
    "computer.wait": ("seconds",),
    "computer.terminate": ("status", "answer"),
}
"""Parameters of the known calls, in pyautogui's order; `pyautogui.hotkey` takes any number of keys."""
_SYNONYMS = {"text": "message", "amount": "clicks", "key": "keys", "duration": "seconds", "time": "seconds"}
"""Other names of parameters, for calls that do not have a parameter of this name."""
_IGNORED = ("tween", "_pause", "logScreenshot")
"""Parameters without a meaning here, which need not be constants."""
_BUTTONS = {"left": "left", "primary": "left", "right": "right", "secondary": "right", "middle": "middle"}
_CLICKS = {
    ("left", 1): ActionKind.CLICK,
    ("left", 2): ActionKind.DOUBLE_CLICK,
    ("left", 3): ActionKind.TRIPLE_CLICK,
    ("right", 1): ActionKind.RIGHT_CLICK,
    ("middle", 1): ActionKind.MIDDLE_CLICK,
}
_CLICK_CALLS = {
    "pyautogui.click": ("left", 1),
    "pyautogui.leftClick": ("left", 1),
    "pyautogui.rightClick": ("right", 1),
    "pyautogui.middleClick": ("middle", 1),
    "pyautogui.doubleClick": ("left", 2),
    "pyautogui.tripleClick": ("left", 3),
    "computer.triple_click": ("left", 3),
    "computer.tripleClick": ("left", 3),
}
_PRINTED_KEYS = {"enter": "\n", "tab": "\t", "space": " "}


def parse_code(code: str, fractions_of: tuple[int, int] | None = None) -> PolicyResponse:
    """Return the action of code, with an empty thought.

    Args:
        code: Python code.
        fractions_of: (width, height) in pixels if coordinates are fractions of them; None: coordinates are numbers of
            pixels.

    Raises:
        FormatError: the code contains anything but one action of known calls with constant arguments.
    """
    held: list[str] = []
    found: list[PolicyResponse] = []
    is_released = False
    for name, arguments in _calls(code):
        if name == "pyautogui.keyUp":
            if held and not found:
                found.append(PolicyResponse("", Action(ActionKind.HOTKEY, keys=tuple(held))))
            for key in check_keys(arguments.get("key"), "key", name):
                if key not in held:
                    raise FormatError(f"keyUp: {shorten(key)} is not held")
                held.remove(key)
            is_released = True
        elif is_released:
            raise FormatError("the code contains more than one action")
        elif name == "pyautogui.keyDown":
            if found:
                raise FormatError("keyDown after the action")
            held += check_keys(arguments.get("key"), "key", name)
        else:
            response = _READERS[name](name, _in_pixels(arguments, name, fractions_of))
            found.append(replace(response, action=_hold(response.action, tuple(held))))
    if held:
        raise FormatError(f"the key {shorten(held[0])} is not released: an action ends with all keys released")
    return _join(found)


def _in_pixels(arguments: _Arguments, name: str, fractions_of: tuple[int, int] | None) -> _Arguments:
    """Return the arguments of a call with `x` and `y` in pixels; the fraction 1 is the last pixel."""
    if fractions_of is None:
        return arguments
    converted = dict(arguments)
    for key, size in zip(("x", "y"), fractions_of, strict=True):
        if arguments.get(key) is not None:
            fraction = check_number(arguments[key], key, name)
            if not 0 <= fraction <= 1:
                raise FormatError(f"{name}: {key} is not a fraction between 0 and 1")
            converted[key] = min(round(fraction * size), size - 1)
    return converted


def _calls(code: str) -> list[tuple[str, _Arguments]]:
    """Return the known calls of code with their arguments by name."""
    _check_tokens(code)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes such as "\\d", which Python reads as they are
            body = ast.parse(code.strip()).body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise FormatError("the code is not valid Python") from None
    calls = []
    for statement in body:
        if isinstance(statement, ast.Import) and all(alias.name in _MODULES for alias in statement.names):
            continue
        if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Call):
            raise FormatError("the code contains something else than calls")
        calls.append(_named_call(statement.value))
        if len(calls) > _MAX_CALLS:
            raise FormatError("the code contains more than one action")
    return calls


def _check_tokens(code: str) -> None:
    """Raise FormatError unless code consists of calls with constant arguments, as far as its tokens show."""
    position = depth = 0
    while position < len(code):
        token = _TOKEN.match(code, position)
        if token is None:
            raise FormatError(
                f"{shorten(code[position : position + 100])} is not part of a call with constant arguments"
            )
        depth += (token["open"] is not None) - (token["close"] is not None)
        if depth > _MAX_DEPTH:
            raise FormatError("the code contains nested calls")
        position = token.end()


def _named_call(call: ast.Call) -> tuple[str, _Arguments]:
    """Return the name of a known call and its arguments by parameter."""
    function = call.func
    if not isinstance(function, ast.Attribute) or not isinstance(function.value, ast.Name):
        raise FormatError("the code calls something else than a function of pyautogui or computer")
    name = f"{function.value.id}.{function.attr}"
    values = [_constant(argument, name) for argument in call.args]
    keywords = {
        keyword.arg: _constant(keyword.value, name)
        for keyword in call.keywords
        if keyword.arg is not None and keyword.arg not in _IGNORED
    }
    if name == "pyautogui.hotkey":
        return name, {"keys": values} | keywords if values else keywords
    parameters = _PARAMETERS.get(name)
    if parameters is None:
        raise FormatError(f"unknown call {shorten(name)}")
    if len(values) > len(parameters):
        raise FormatError(f"{name} has too many arguments")
    arguments = dict(zip(parameters, values, strict=False))
    for written, value in keywords.items():
        keyword = written if written in parameters else _SYNONYMS.get(written, written)
        if keyword in arguments:
            raise FormatError(f"{name}: {shorten(written)} is given twice")
        if keyword not in parameters:
            raise FormatError(f"{name}: {shorten(written)} is not an argument of this call")
        arguments[keyword] = value
    return name, arguments


def _constant(node: ast.expr, name: str) -> Any:
    """Return a constant argument; raises FormatError for any other expression."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant):
        number = node.operand.value
        if isinstance(number, int | float) and isinstance(node.op, ast.USub | ast.UAdd):
            return -number if isinstance(node.op, ast.USub) else number
    if isinstance(node, ast.List | ast.Tuple):
        return [_constant(element, name) for element in node.elts]
    raise FormatError(f"{name}: an argument is not a constant")


def _hold(action: Action, keys: tuple[str, ...]) -> Action:
    """Return an action during which keys are held."""
    if not keys:
        return action
    if action.kind is not ActionKind.HOTKEY and not action.has_point:
        raise FormatError(f"keys cannot be held during {action.kind}")
    return replace(action, keys=keys + action.keys)


def _join(found: list[PolicyResponse]) -> PolicyResponse:
    """Return the one action that calls stand for together."""
    match found:
        case []:
            raise FormatError("the code contains no action")
        case [only]:
            return only
        case [first, second] if first.action.kind is ActionKind.MOVE and second.starts_at_pointer:
            start, action = first.action, second.action
            return replace(second, action=replace(action, x=start.x, y=start.y), starts_at_pointer=False)
        case [first, second] if first.action.kind is ActionKind.TYPE and second.action == _ENTER:
            return replace(first, action=replace(first.action, text=first.action.text + "\n"))
    raise FormatError("the code contains more than one action")


_ENTER = Action(ActionKind.HOTKEY, keys=("enter",))


def _at_point(action: Action, arguments: _Arguments, name: str) -> PolicyResponse:
    """Return an action at the point `x`, `y`, or where the pointer is."""
    x, y = arguments.get("x"), arguments.get("y")
    point = None if x is None and y is None else x if isinstance(x, list) else [x, y]
    return at_point(action, point, "(x, y)", name)


def _read_click(name: str, arguments: _Arguments) -> PolicyResponse:
    button, num_clicks = _CLICK_CALLS[name]
    if arguments.get("button") is not None:
        button = _BUTTONS.get(str(arguments["button"]).lower(), "unknown")
    if arguments.get("clicks") is not None:
        num_clicks = round(check_number(arguments["clicks"], "clicks", name))
    kind = _CLICKS.get((button, num_clicks))
    if kind is None:
        raise FormatError(f"{name}: the mouse cannot click the {button} button {num_clicks} times in one action")
    return _at_point(Action(kind), arguments, name)


def _read_move(name: str, arguments: _Arguments) -> PolicyResponse:
    response = _at_point(Action(ActionKind.MOVE), arguments, name)
    if response.starts_at_pointer:
        raise FormatError(f"{name} has no point")
    return response


def _read_drag(name: str, arguments: _Arguments) -> PolicyResponse:
    if _BUTTONS.get(str(arguments.get("button") or "left").lower()) != "left":
        raise FormatError(f"{name}: only the left button drags")
    end = _read_move(name, arguments).action
    return PolicyResponse("", Action(ActionKind.DRAG, end_x=end.x, end_y=end.y), starts_at_pointer=True)


def _read_scroll(name: str, arguments: _Arguments) -> PolicyResponse:
    distance = notches(check_number(arguments.get("clicks"), "clicks", name))
    if distance == 0:
        raise FormatError(f"{name}: the distance is 0")
    right, down = (distance, 0) if name == "pyautogui.hscroll" else (0, -distance)
    return _at_point(Action(ActionKind.SCROLL, scroll_x=right, scroll_y=down), arguments, name)


def _read_write(name: str, arguments: _Arguments) -> PolicyResponse:
    return PolicyResponse("", Action(ActionKind.TYPE, text=check_typed_text(arguments.get("message"), "message", name)))


def _read_hotkey(name: str, arguments: _Arguments) -> PolicyResponse:
    written = arguments.get("keys")
    if isinstance(written, list) and len(written) == 1 and isinstance(written[0], list):
        written = written[0]
    return PolicyResponse("", Action(ActionKind.HOTKEY, keys=check_keys(written, "keys", name)))


def _read_press(name: str, arguments: _Arguments) -> PolicyResponse:
    """Return the presses of one key, or of several keys that type characters."""
    keys = check_keys(arguments.get("keys"), "keys", name)
    presses = arguments.get("presses")
    repeat = 1 if presses is None else round(check_number(presses, "presses", name))
    if repeat < 1:
        raise FormatError(f"{name}: presses is less than 1")
    if len(set(keys)) == 1:
        num_presses = min(repeat * len(keys), MAX_REPEATS)
        return PolicyResponse("", Action(ActionKind.HOTKEY, keys=keys[:1], repeat=num_presses))
    characters = [_PRINTED_KEYS.get(key, key) for key in keys]
    if any(len(character) > 1 for character in characters):
        raise FormatError(f"{name}: several different keys one after another are more than one action")
    return PolicyResponse("", Action(ActionKind.TYPE, text="".join(characters) * min(repeat, MAX_REPEATS)))


def _read_wait(name: str, arguments: _Arguments) -> PolicyResponse:
    seconds = arguments.get("seconds")
    duration_s = _DEFAULT_WAIT_S if seconds is None else check_seconds(seconds, "seconds", name)
    return PolicyResponse("", Action(ActionKind.WAIT, seconds=duration_s))


def _read_terminate(name: str, arguments: _Arguments) -> PolicyResponse:
    status = arguments.get("status")
    if not isinstance(status, str) or status.lower() not in ("success", "failure", "fail"):
        raise FormatError(f"{name}: status is neither success nor failure")
    answer = arguments.get("answer")
    text = "" if answer is None else check_text(answer, "answer", name)
    if status.lower() == "success":
        return PolicyResponse("", Action(ActionKind.FINISHED, text=text))
    return PolicyResponse("", Action(ActionKind.INFEASIBLE))


_READERS: dict[str, Callable[[str, _Arguments], PolicyResponse]] = {
    **dict.fromkeys(_CLICK_CALLS, _read_click),
    "pyautogui.moveTo": _read_move,
    "pyautogui.dragTo": _read_drag,
    **dict.fromkeys(["pyautogui.scroll", "pyautogui.vscroll", "pyautogui.hscroll"], _read_scroll),
    **dict.fromkeys(["pyautogui.write", "pyautogui.typewrite"], _read_write),
    "pyautogui.hotkey": _read_hotkey,
    "pyautogui.press": _read_press,
    **dict.fromkeys(["pyautogui.sleep", "time.sleep", "computer.wait"], _read_wait),
    "computer.terminate": _read_terminate,
}


def render_code(action: Action) -> str:
    """Return the code of an action."""
    here = f"x={action.x}, y={action.y}"
    match action.kind:
        case ActionKind.TRIPLE_CLICK:
            code = f"computer.triple_click({here})"
        case ActionKind.DRAG:
            code = f"pyautogui.moveTo({here})\npyautogui.dragTo(x={action.end_x}, y={action.end_y}, button='left')"
        case ActionKind.SCROLL if action.scroll_x:
            code = f"pyautogui.hscroll({action.scroll_x}, {here})"
        case ActionKind.SCROLL:
            code = f"pyautogui.scroll({-action.scroll_y}, {here})"
        case ActionKind.HOTKEY if action.repeat != 1 and len(action.keys) == 1:
            code = f"pyautogui.press({action.keys[0]!r}, presses={action.repeat})"
        case ActionKind.HOTKEY:
            code = f"pyautogui.hotkey({', '.join(map(repr, action.keys))})"
        case ActionKind.TYPE:
            code = f"pyautogui.write(message={action.text!r})"
        case ActionKind.WAIT:
            code = f"computer.wait({action.seconds:g})"
        case ActionKind.FINISHED:
            answer = f", answer={action.text!r}" if action.text else ""
            code = f"computer.terminate(status='success'{answer})"
        case ActionKind.INFEASIBLE:
            code = "computer.terminate(status='failure')"
        case _:
            code = f"pyautogui.{_CALLS_WITH_A_POINT[action.kind]}({here})"
    if action.has_point and action.keys:
        down, up = ([f"pyautogui.{call}({key!r})" for key in action.keys] for call in ("keyDown", "keyUp"))
        code = "\n".join([*down, code, *reversed(up)])
    return code


_CALLS_WITH_A_POINT = {
    ActionKind.CLICK: "click",
    ActionKind.DOUBLE_CLICK: "doubleClick",
    ActionKind.RIGHT_CLICK: "rightClick",
    ActionKind.MIDDLE_CLICK: "middleClick",
    ActionKind.MOVE: "moveTo",
}
