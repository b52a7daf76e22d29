"""Reader of the results of OSWorld's runners: `<application>/<task id>/` with traj.jsonl, screenshots and result.txt.

    {"step_num": 1, "action": "pyautogui.click(412, 230)", "response": …, "screenshot_file": "step_1_….png", …}

`screenshot_file` shows the screen after the action, so each action belongs to the screenshot of the line before it; the
first belongs to that of the initial state, which only some runners write. Actions are pyautogui code, WAIT, DONE or
FAIL, or objects of the action space `computer_13`. Format: lib_run_single.py and desktop_env of
github.com/xlang-ai/OSWorld.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.agent.action_language import PolicyResponse
from deskrl.actor.agent.pyautogui_code import parse_code
from deskrl.analysis.datasets.recorded_episode import (
    RecordedEpisode,
    RecordedStep,
    UnreadableError,
    find_thought,
    read_inside,
    read_lines,
    text_of,
)
from deskrl.core.errors import UserError
from deskrl.core.file_io import open_regular_file, read_json_object
from deskrl.core.left_out import LeftOut

FILE_NAME = "traj.jsonl"

_INITIAL_SCREENSHOTS = ("initial_state.png", "step_0.png", "step_0_*.png", "step_reset*.png")
_MAX_SCORE_BYTES = 100
_WAIT_S = 1.0
"""Duration of WAIT in OSWorld's environment, in seconds."""
_SPECIAL = {
    "WAIT": Action(ActionKind.WAIT, seconds=_WAIT_S),
    "DONE": Action(ActionKind.FINISHED),
    "FAIL": Action(ActionKind.INFEASIBLE),
}
_COMPUTER_13 = {
    "MOVE_TO": "pyautogui.moveTo",
    "CLICK": "pyautogui.click",
    "RIGHT_CLICK": "pyautogui.rightClick",
    "DOUBLE_CLICK": "pyautogui.doubleClick",
    "DRAG_TO": "pyautogui.dragTo",
    "TYPING": "pyautogui.write",
    "PRESS": "pyautogui.press",
    "HOTKEY": "pyautogui.hotkey",
}
"""Call of pyautogui for each action of computer_13 that differs in nothing but the form."""
_NOTE = re.compile(r"^\s*+('''|\"\"\")(.*?)\1[ \t]*+$", re.M | re.S)
"""Text that agents write into their code as a string without effect."""
_PAUSE = re.compile(r"^[ \t]*+(?:time|pyautogui)\.sleep\([^()\n]*+\)[ \t]*+$", re.M)
_IMPORT = re.compile(r"^[ \t]*+import (?:pyautogui|time|pyperclip)[ \t]*+$", re.M)
_PASTE = re.compile(r"^pyperclip\.copy\((.*)\)\s*\n\s*pyautogui\.hotkey\((['\"])ctrl\2, ?(['\"])v\3\)$", re.M)
"""Text that is entered through the clipboard."""


def read_osworld(root: Path, tasks: Path | None, left_out: LeftOut) -> Iterator[RecordedEpisode]:
    """Yield the episodes below a folder of results.

    Args:
        root: folder of results.
        tasks: folder of task files `<application>/<id>.json`, from which the instructions are read.
        left_out: counts what cannot be read.

    Raises:
        UserError: `tasks` is not a folder.
    """
    if tasks is None or not tasks.is_dir():
        problem = f"{tasks}: not a folder" if tasks is not None else f"{root}: OSWorld's results have no instructions"
        raise UserError(problem, "give OSWorld's evaluation_examples/examples with --tasks")
    for path in sorted(root.rglob(FILE_NAME)):
        folder = path.parent
        name = str(folder.relative_to(root)) if folder != root else folder.name
        application, task_id = folder.parent.name, folder.name
        try:
            task = read_json_object(tasks / application / f"{task_id}.json", "")
        except UserError:
            left_out.add("episode", "its task file is missing or damaged", name)
            continue
        if not text_of(task, "instruction"):
            left_out.add("episode", "its task file has no instruction", name)
            continue
        try:
            steps = list(_steps(path, name, left_out))
        except UserError as error:
            left_out.add("episode", f"its {FILE_NAME} cannot be read", f"{name} ({error.message})")
            continue
        yield RecordedEpisode(
            name=name,
            task_id=task_id,
            instruction=text_of(task, "instruction"),
            source="OSWorld",
            steps=steps,
            reward=_read_score(folder / "result.txt"),
            application=application,
            task=task,
        )


def _steps(path: Path, name: str, left_out: LeftOut) -> Iterator[RecordedStep]:
    folder = path.parent
    found = [file.name for pattern in _INITIAL_SCREENSHOTS for file in sorted(folder.glob(pattern))]
    before = found[0] if found else ""
    for number, record in read_lines(path, left_out):
        where = f"{name} line {number}"
        if "action" not in record:
            left_out.add("line", "it has no action", where)
            continue
        yield RecordedStep(
            name=where,
            read_screenshot=partial(_read_screenshot, folder, before),
            read_action=partial(_read_action, record["action"]),
            thought=_thought(record),
        )
        before = text_of(record, "screenshot_file")


def _read_screenshot(folder: Path, name: str) -> bytes:
    if not name:
        raise UnreadableError("no screenshot shows the screen before the action")
    return read_inside([folder], name)


def _read_score(path: Path) -> float | None:
    """Return the score of an episode; None if it is missing or not a finite number."""
    try:
        with open_regular_file(path) as file:
            score = float(file.read(_MAX_SCORE_BYTES))
    except (OSError, ValueError):
        return None
    return score if math.isfinite(score) else None


def _thought(record: Mapping[str, Any]) -> str:
    """Return the thought of the response, or of a note in the code."""
    thought = find_thought(text_of(dict(record), "response"))
    if thought:
        return thought
    note = _NOTE.search(_code_of(record["action"]))
    return "" if note is None else find_thought(note[2])


def _read_action(action: Any, screen_size: tuple[int, int]) -> PolicyResponse:
    """Return an action; raises FormatError or UnreadableError if it is none that deskrl has."""
    if isinstance(action, dict) and "action_type" in action and "command" not in action:
        kind = action["action_type"]
        if isinstance(kind, str) and kind in _SPECIAL:
            return PolicyResponse("", _SPECIAL[kind])
        return parse_code(_computer_13_code(action))
    code = _code_of(action).strip()
    if code in _SPECIAL:
        return PolicyResponse("", _SPECIAL[code])
    if not code:
        raise UnreadableError("its action has an unknown form")
    return parse_code(_plain_code(code))


def _code_of(action: Any) -> str:
    """Return the code of an action: a text, or the field of an object in which some agents write it."""
    if isinstance(action, str):
        return action
    if isinstance(action, dict):
        return text_of(action, "command") or text_of(action, "action")
    return ""


def _plain_code(code: str) -> str:
    """Return code without what agents write around the action: notes, imports, pauses, and typing by the clipboard."""
    bare = _IMPORT.sub("", _NOTE.sub("", code))
    without_pauses = _PAUSE.sub("", bare)
    if not without_pauses.strip():  # the pause is the action
        return bare
    return _PASTE.sub(r"pyautogui.write(\1)", "\n".join(line for line in without_pauses.splitlines() if line.strip()))


def _computer_13_code(action: Mapping[str, Any]) -> str:
    """Return the code of an action of computer_13; its values are checked when the code is read."""
    kind = str(action["action_type"])
    # Some runners write the parameters beside the type.
    parameters = action.get("parameters")
    values = parameters if isinstance(parameters, dict) else action
    if kind == "SCROLL":
        right, up = values.get("dx") or 0, values.get("dy") or 0
        if right and up:
            raise UnreadableError("it scrolls in two directions")
        return f"pyautogui.hscroll({right!r})" if right else f"pyautogui.scroll({up!r})"
    if kind not in _COMPUTER_13:
        raise UnreadableError("its action of computer_13 is none that deskrl has", kind[:20])
    arguments = [
        f"{'clicks' if key == 'num_clicks' else key}={value!r}"
        for key, value in values.items()
        if key not in ("action_type", "parameters")
    ]
    return f"{_COMPUTER_13[kind]}({', '.join(arguments)})"
