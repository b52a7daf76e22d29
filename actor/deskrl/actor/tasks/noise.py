"""Noisy variants of tasks: the same task on a desktop where other things lie about. Knows task files, no desktop.

A variant has the task's instruction and its evaluator; only steps of its setup are added, so it is as solvable as the
task. What a level adds (each has what the one before has, too):

    light    files in a folder of the home that the task does not name, and a window of another application, which was
             open before the task's own
    medium   a second such window, a further tab where the task opens tabs, and a note above a corner of the screen
    heavy    a message in the middle that has the focus until it is closed

Noise stays away from what the task is about: its folders, its applications, and the targets of its scripted solution,
if it has one; under a heavy level that solution begins by closing the message. `noise_meta` in the variant says what
was added, and what was left out for which reason. The same task, level and seed give the same bytes.

The steps are such as OSWorld's desktop takes, too.
"""

from __future__ import annotations

import json
import random
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.tasks.files import Task
from deskrl.actor.tasks.noise_window import MARGIN, NOTE_SIZE
from deskrl.core.ids import derive_seed

Level = Literal["light", "medium", "heavy"]
LEVELS: tuple[Level, ...] = get_args(Level)
SUFFIX = "_noise"
"""What the file names of variants add to the task's id."""

_SCREEN = (1280, 720)  # scripted solutions are in its pixels
_CORNERS = ("top-right", "bottom-right", "bottom-left")
_FOLDERS = ("Downloads", "Music", "Videos", "Templates", "Public", "Shared")
_TEXTS = {
    "minutes": "Present: Ada, Grace, Alan\n1. Budget of the spring\n2. The leaking roof",
    "recipe": "200 g flour\n2 eggs\na pinch of salt",
    "packing": "socks\ncharger\npassport\numbrella",
    "quotes": "Well begun is half done.\nMore haste, less speed.",
    "ideas": "- a bench for the yard\n- repair the bicycle",
    "phone": "Baker 555-0134\nDentist 555-0171",
}
_SUBFOLDERS = ("Invoices", "Holiday", "Old laptop", "School")
_NOTES = (
    ("VPN connection", "Connected to US-West server"),
    ("Storage", "1.2 GB of 5 GB are used"),
    ("Calendar", "Choir practice at 19:30"),
    ("Network", "You are now connected"),
)
_MESSAGES = (
    ("Software update", "Updates are ready to be installed.", "They are installed at the next start."),
    ("Backup", "The last backup is 12 days old.", "Connect your disk when you have time."),
    ("Printer", "The printer in the study is out of paper.", "1 document is waiting."),
)
_WINDOWS = {
    "text": {"gedit", "mousepad", "text_editor", "writer"},
    "folder": {"files", "nautilus", "os", "pcmanfm"},
}
"""Kinds of windows, each with the applications that a task must not be about: they might share a window."""

_WAITING = {"activate_window", "chrome_open_tabs", "execute_with_verification", "open", "sleep"}
"""Setup steps that go on once a window is there."""

_OPENS_WITHIN_S = 5
_TAB_GETTERS = {"open_tabs_info"}
_PROGRAM = Path(__file__).with_name("noise_window.py").read_text(encoding="utf-8")

_Step = dict[str, Any]


@dataclass
class _Noise:
    """What is added to a task."""

    before: list[_Step] = field(default_factory=list)
    """Setup steps before the task's own."""
    after: list[_Step] = field(default_factory=list)
    tabs: list[str] = field(default_factory=list)
    adds: list[str] = field(default_factory=list)
    leaves_out: list[str] = field(default_factory=list)


def make_noisy(task: Task, level: Level, seed: int = 0) -> bytes:
    """The task file of a variant."""
    drawn = random.Random(derive_seed("noise", seed, task.id))
    noise = _Noise()
    raw = json.loads(task.data)
    depth = LEVELS.index(level)
    _add_files_and_windows(noise, task, drawn, num_windows=min(2, depth + 1), with_tab=depth >= 1)
    if depth >= 1:
        if _opens_late(task):
            noise.after.append({"type": "sleep", "parameters": {"seconds": _OPENS_WITHIN_S}})
        _add_note(noise, task, drawn)
    if depth >= 2:
        title, *lines = drawn.choice(_MESSAGES)
        noise.after.append(_window_step(title, lines, "center"))
        noise.adds.append(f"a message that has the focus until it is closed: {title}")
    config = raw.get("config", [])
    raw["config"] = [*noise.before, *_with_tabs(config, noise.tabs), *noise.after]
    if depth >= 2 and task.solution:
        close = {"thought": "Close the message.", "action": {"kind": "hotkey", "keys": ["alt", "f4"]}}
        raw["deskrl"]["solution"] = [close, *raw["deskrl"]["solution"]]
    raw["noise_meta"] = {
        "generated_by": "deskrl tasks noisy",
        "noise_level": level,
        "seed": seed,
        "adds": noise.adds,
        "leaves_out": noise.leaves_out,
    }
    return (json.dumps(raw, indent=2, ensure_ascii=False) + "\n").encode()


def _add_files_and_windows(
    noise: _Noise, task: Task, drawn: random.Random, *, num_windows: int, with_tab: bool
) -> None:
    text = task.data.decode()
    free = [name for name in drawn.sample(_FOLDERS, len(_FOLDERS)) if name not in text]
    names = drawn.sample(sorted(_TEXTS), 3)
    subfolder = drawn.choice(_SUBFOLDERS)
    kinds = drawn.sample(sorted(_WINDOWS), len(_WINDOWS))
    if not free:
        noise.leaves_out.append("files and windows: the task names every folder that they could be in")
        return
    folder = f"/home/user/{free[0]}"
    noise.before.append(_files_step(folder, names, subfolder))
    noise.adds.append(f"files in ~/{free[0]}")
    paths = {"text": f"{folder}/{names[0]}.txt", "folder": f"{folder}/{subfolder}"}
    apps = {"_".join(name.lower().split()) for name in task.related_apps}
    allowed = [kind for kind in kinds if not apps & _WINDOWS[kind]]
    for kind in allowed[:num_windows]:
        noise.before.append({"type": "open", "parameters": {"path": paths[kind]}})
        noise.adds.append(f"a window that was open before: {paths[kind]}")
    if len(allowed) < num_windows:
        refused = ", ".join(kind for kind in kinds if kind not in allowed)
        noise.leaves_out.append(
            f"{num_windows - len(allowed)} window: the task is about applications of its kind ({refused})"
        )
    if with_tab and any(step.type == "chrome_open_tabs" for step in task.config):
        _add_tab(noise, task, f"file://{folder}/{names[1]}.html")


def _opens_late(task: Task) -> bool:
    """Whether a window of the task may still be about to open when its setup ends, on top of all and with the focus."""
    last = max((index for index, step in enumerate(task.config) if step.type == "launch"), default=None)
    return last is not None and not any(step.type in _WAITING for step in task.config[last + 1 :])


def _add_tab(noise: _Noise, task: Task, url: str) -> None:
    if any(item.type in _TAB_GETTERS for check in task.evaluator.checks for item in check.items):
        noise.leaves_out.append("a tab: the evaluator looks at the tabs")
        return
    noise.tabs.append(url)
    noise.adds.append(f"a tab before the task's own: {url}")


def _add_note(noise: _Noise, task: Task, drawn: random.Random) -> None:
    title, line = drawn.choice(_NOTES)
    corners = [corner for corner in drawn.sample(_CORNERS, len(_CORNERS)) if not _covers_target(corner, task)]
    if not corners:
        noise.leaves_out.append("a note: the solution needs every corner of the screen")
        return
    noise.after.append(_window_step(title, [title, line], corners[0]))
    noise.adds.append(f"a note above the corner {corners[0]}: {title}")


def _covers_target(corner: str, task: Task) -> bool:
    """Whether a note in that corner would lie on something that the scripted solution aims at."""
    width, height = NOTE_SIZE[0] + 2 * MARGIN, NOTE_SIZE[1] + 2 * MARGIN
    left = 0 if "left" in corner else _SCREEN[0] - width
    top = 0 if "top" in corner else _SCREEN[1] - height
    return any(
        x1 >= left and x0 <= left + width and y1 >= top and y0 <= top + height
        for step in task.solution
        for x0, y0, x1, y1 in _targets(step.action, step.box)
    )


def _targets(action: Action, box: tuple[int, int, int, int] | None) -> list[tuple[int, int, int, int]]:
    if action.kind in (ActionKind.TYPE, ActionKind.HOTKEY, ActionKind.WAIT) or action.ends_episode:
        return []
    points = [box or (action.x, action.y, action.x, action.y)]
    if action.kind is ActionKind.DRAG:
        points.append((action.end_x, action.end_y, action.end_x, action.end_y))
    return points


def _with_tabs(config: list[_Step], tabs: list[str]) -> list[_Step]:
    """The steps with `tabs` before the tabs that the first step of that kind opens."""
    for index, step in enumerate(config):
        if tabs and step.get("type") == "chrome_open_tabs":
            parameters = step["parameters"]
            opened = parameters | {"urls_to_open": [*tabs, *parameters["urls_to_open"]]}
            return [*config[:index], step | {"parameters": opened}, *config[index + 1 :]]
    return config


def _files_step(folder: str, names: list[str], subfolder: str) -> _Step:
    text, page, inner = names
    lines = [f"mkdir -p {shlex.quote(f'{folder}/{subfolder}')}"]
    for path, content in (
        (f"{text}.txt", _TEXTS[text]),
        (f"{page}.html", f"<title>{page}</title><pre>{_TEXTS[page]}</pre>"),
        (f"{subfolder}/{inner}.txt", _TEXTS[inner]),
    ):
        lines.append(f"printf '%s\\n' {shlex.quote(content)} > {shlex.quote(f'{folder}/{path}')}")
    return {"type": "execute", "parameters": {"command": ["bash", "-c", " && ".join(lines)]}}


def _window_step(title: str, lines: list[str], place: str) -> _Step:
    window = json.dumps({"title": title, "lines": lines, "place": place})
    return {"type": "execute", "parameters": {"command": ["python", "-c", _PROGRAM, window]}}
