"""Noisy variants of tasks: the same task on a desktop with unrelated files, windows and messages.

A variant has the task's instruction and evaluator, and additional setup steps, so that it can be solved in the same way
as the task. Each level includes the previous one:

    light    files in a directory of the home directory that the task does not mention, and a window of another
             application, opened before the task's own
    medium   a second such window, an additional tab if the task opens tabs, and a note above a corner of the screen
    heavy    a message in the centre of the screen that has the focus until it is closed

Noise avoids what the task is about: its directories, its applications, and the targets of its scripted solution. At the
level heavy, the scripted solution starts by closing the message. `noise_meta` of the variant lists what was added, and
what was left out and why. The same task, level and seed give identical bytes. OSWorld's desktop supports the steps.

A run draws noise anew for each training group if `tasks.noise` is set, and for each episode of an evaluation if
`tasks.eval_noise` is (`add_rollout_noise`). All rollouts of a training group have the same noise, because its
advantages compare them with one another.
"""

from __future__ import annotations

import json
import random
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.task import Task
from deskrl.actor.tasks.noise_window import MARGIN, NOTE_SIZE
from deskrl.actor.tasks.task_lists import ListedTask, load_list, locate_tasks, read_list, write_list
from deskrl.actor.tasks.task_schema import parse_task
from deskrl.core.config import RunConfig, TasksConfig
from deskrl.core.errors import UserError
from deskrl.core.ids import derive_seed
from deskrl.proto.v1 import rollout_pb2

NoiseLevel = Literal["light", "medium", "heavy"]
"""Amount of noise."""

NoiseSetting = Literal["none", "light", "medium", "heavy"]
"""Value of `tasks.noise`."""

NOISE_LEVELS: tuple[NoiseLevel, ...] = get_args(NoiseLevel)
NOISY_SUFFIX = "_noise"
"""Suffix of the file names of variants, after the task id."""

_EVALUATION_QUEUES = "eval/"
"""Prefix of the names of queues whose groups are not trained on."""
_SCREEN = (1280, 720)  # coordinates of scripted solutions are pixels of this screen
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
"""Applications of a task that exclude a kind of window, because they might share the window; by kind."""

_WINDOW_STEPS = {"activate_window", "chrome_open_tabs", "execute_with_verification", "open", "sleep"}
"""Types of setup steps that wait for a window."""

_WINDOW_START_S = 5
_TAB_GETTERS = {"open_tabs_info"}
_PROGRAM = Path(__file__).with_name("noise_window.py").read_text(encoding="utf-8")

_Step = dict[str, Any]


@dataclass
class _Noise:
    """Noise that is added to a task."""

    before: list[_Step] = field(default_factory=list)
    """Setup steps before the task's own."""
    after: list[_Step] = field(default_factory=list)
    """Setup steps after the task's own."""
    tabs: list[str] = field(default_factory=list)
    """URLs of additional tabs."""
    adds: list[str] = field(default_factory=list)
    """Descriptions of what is added."""
    leaves_out: list[str] = field(default_factory=list)
    """Descriptions of what is left out, with reasons."""


@dataclass(frozen=True)
class NoisyVariant:
    """Noisy variant of a task, written to a file."""

    task: ListedTask
    """Original task."""
    leaves_out: list[str]
    """Noise that was left out, with reasons."""


def write_noisy_list(
    path: Path, output_dir: Path, level: NoiseLevel, seed: int = 0, root: Path | None = None
) -> list[NoisyVariant]:
    """Write a noisy variant of each task of a list to `output_dir/examples_noisy`, and a copy of the list.

    Args:
        path: task list.
        output_dir: directory to write to; created if it does not exist.
        level: amount of noise.
        seed: seed of the variants.
        root: directory of the original task files; None: `examples/` next to the list.

    Raises:
        UserError: the list or a task file is invalid, a task does not exist, or a file cannot be written.
    """
    listed = read_list(path)
    variants = []
    try:
        for original, task in zip(locate_tasks(path, listed, root, ""), load_list(path, root, ""), strict=True):
            data = make_noisy(task, level, seed)
            target = output_dir / "examples_noisy" / original.application / f"{original.id}{NOISY_SUFFIX}.json"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
            variants.append(NoisyVariant(original, json.loads(data)["noise_meta"]["leaves_out"]))
        write_list(output_dir / path.name, listed)
    except OSError as error:
        raise UserError(f"{output_dir}: cannot be written: {error.strerror}", "give a writable directory") from error
    return variants


def with_noise(task: Task, level: NoiseSetting, seed: int) -> Task:
    """Return a noisy variant of a task; the task itself if the level is "none"."""
    if level == "none":
        return task
    return replace(parse_task(make_noisy(task, level, seed), f"task {task.id}"), domain=task.domain)


def add_rollout_noise(task: Task, rollout: rollout_pb2.Rollout, config: RunConfig) -> Task:
    """Return the task of a rollout with the noise that the run configures.

    In training only the run's seed and the group determine the noise, in evaluations the seed of the rollout.
    """
    if rollout.queue.startswith(_EVALUATION_QUEUES):
        return with_noise(task, config.tasks.eval_noise, rollout.seed)
    return with_noise(task, config.tasks.noise, derive_seed(config.seed, rollout.group_id))


def highest_level(config: TasksConfig) -> NoiseSetting:
    """Return the higher one of the noise levels of training and evaluation; it includes the other one."""
    return max((config.noise, config.eval_noise), key=get_args(NoiseSetting).index)


def make_noisy(task: Task, level: NoiseLevel, seed: int = 0) -> bytes:
    """Return the content of the task file of a noisy variant."""
    generator = random.Random(derive_seed("noise", seed, task.id))
    noise = _Noise()
    raw = json.loads(task.data)
    depth = NOISE_LEVELS.index(level)
    _add_files_and_windows(noise, task, generator, num_windows=min(2, depth + 1), with_tab=depth >= 1)
    if depth >= 1:
        if _opens_late(task):
            noise.after.append({"type": "sleep", "parameters": {"seconds": _WINDOW_START_S}})
        _add_note(noise, task, generator)
    if depth >= 2:
        title, *lines = generator.choice(_MESSAGES)
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
    noise: _Noise, task: Task, generator: random.Random, *, num_windows: int, with_tab: bool
) -> None:
    text = task.data.decode()
    free = [name for name in generator.sample(_FOLDERS, len(_FOLDERS)) if name not in text]
    names = generator.sample(sorted(_TEXTS), 3)
    subfolder = generator.choice(_SUBFOLDERS)
    kinds = generator.sample(sorted(_WINDOWS), len(_WINDOWS))
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
        excluded = ", ".join(kind for kind in kinds if kind not in allowed)
        noise.leaves_out.append(
            f"{num_windows - len(allowed)} window: the task is about applications of its kind ({excluded})"
        )
    if with_tab and any(step.type == "chrome_open_tabs" for step in task.config):
        _add_tab(noise, task, f"file://{folder}/{names[1]}.html")


def _opens_late(task: Task) -> bool:
    """Return whether a window of the task may open, above all others and with the focus, after the setup has ended."""
    last = max((index for index, step in enumerate(task.config) if step.type == "launch"), default=None)
    return last is not None and not any(step.type in _WINDOW_STEPS for step in task.config[last + 1 :])


def _add_tab(noise: _Noise, task: Task, url: str) -> None:
    if any(item.type in _TAB_GETTERS for check in task.evaluator.checks for item in check.items):
        noise.leaves_out.append("a tab: the evaluator looks at the tabs")
        return
    noise.tabs.append(url)
    noise.adds.append(f"a tab before the task's own: {url}")


def _add_note(noise: _Noise, task: Task, generator: random.Random) -> None:
    title, line = generator.choice(_NOTES)
    corners = [corner for corner in generator.sample(_CORNERS, len(_CORNERS)) if not _covers_target(corner, task)]
    if not corners:
        noise.leaves_out.append("a note: the solution needs every corner of the screen")
        return
    noise.after.append(_window_step(title, [title, line], corners[0]))
    noise.adds.append(f"a note above the corner {corners[0]}: {title}")


def _covers_target(corner: str, task: Task) -> bool:
    """Return whether a note in that corner would cover a target of the scripted solution."""
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
    """Return the steps with `tabs` inserted before the tabs that the first step of type `chrome_open_tabs` opens."""
    for index, step in enumerate(config):
        if tabs and step.get("type") == "chrome_open_tabs":
            parameters = step["parameters"]
            changed = parameters | {"urls_to_open": [*tabs, *parameters["urls_to_open"]]}
            return [*config[:index], step | {"parameters": changed}, *config[index + 1 :]]
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
