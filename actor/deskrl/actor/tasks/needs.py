"""What a task needs that may be absent: applications, programs, the live web, accounts, files, steps, evaluators.

`task_needs` follows from the task file and the registries of what is built in, and from nothing else. Whether a need
is met here is asked by `absent_files` (the asset cache), `absent_applications` and `absent_programs` (what an embedded
desktop on this machine finds). Knows what task files say, not what solving the task takes.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from deskrl.actor.tasks.assets import find_asset
from deskrl.actor.tasks.evaluators import GETTERS, METRICS, is_official
from deskrl.actor.tasks.files import Task, TypedItem
from deskrl.actor.tasks.setup_steps import STEPS
from deskrl.core.errors import UserError

_OFFICE = ("libreoffice", "soffice")
_PROGRAMS: dict[str, tuple[str, ...]] = {
    "chrome": ("google-chrome", "chromium"),
    "gimp": ("gimp",),
    "libreoffice": _OFFICE,
    "libreoffice_calc": _OFFICE,
    "libreoffice_impress": _OFFICE,
    "libreoffice_writer": _OFFICE,
    "terminal": ("gnome-terminal", "xterm"),
    "thunderbird": ("thunderbird",),
    "vlc": ("vlc",),
    "vs_code": ("code",),
}
"""What an application may be called as a program, any one of them; one that is not here is called by its own name."""

_OTHER_NAMES = {
    "browser": "chrome",
    "calc": "libreoffice_calc",
    "ubuntu_media_player": "vlc",
    "vscode": "vs_code",
    "writer": "libreoffice_writer",
}
_NO_APPLICATION = {"image", "os", "pdf"}  # related_apps names kinds of files and the desktop itself too

_SHELL_PROGRAMS = {
    *("code", "gedit", "gimp", "gnome-terminal", "google-chrome", "libreoffice", "nautilus", "soffice", "thunderbird"),
    *("bc", "gio", "git", "gsettings", "jq", "notify-send", "pactl", "pip", "pulseaudio", "python", "python3", "socat"),
    *("sudo", "timedatectl", "unzip", "vlc", "wmctrl", "xsel", "zip"),
}
"""Programs that are looked for in shell text: OSWorld's guest has or fetches them, a small system may lack them."""

_COMMAND_STARTS = re.compile(r"(?:^|[|;&\n(]|\bsudo(?:\s+-\S+)*)\s*(?:\w+=\S*\s+)*([\w.-]+)")
_SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/games"
_DESKTOP_PATH = f"{Path(__file__).parents[1] / 'guest' / 'bin'}:{_SYSTEM_PATH}"

_COMMAND_STEPS = ("command", "execute", "execute_with_verification", "launch")
_ACCOUNT_STEPS = ("googledrive", "login")
_ACCOUNT_GETTERS = ("googledrive_file",)
_WEB_GETTERS = {"gotoRecreationPage_and_get_html_content", "info_from_website", "page_info", "pdf_from_url"}
_FETCHES = re.compile(
    r"\b(?:apt|apt-get)\s+(?:-\S+\s+)*(?:install|update)\b"
    r"|\bpip3?\s+install\s+(?:-\S+\s+)*(?![-./~])"
    r"|\b(?:curl|wget|git\s+clone)\s+\S"
)
_HERE = {"", "localhost", "127.0.0.1", "::1"}


@dataclass(frozen=True)
class Needs:
    """What one task needs. Tuples are sorted and without repeats, and empty where nothing is needed."""

    applications: tuple[str, ...]
    """By one name each, whatever task files call them."""
    programs: tuple[str, ...]
    """What its commands start, as far as they tell."""
    network: tuple[str, ...]
    """Why the desktop must reach the live web, or the evaluator a page of it."""
    accounts: tuple[str, ...]
    files: tuple[str, ...]
    """Addresses of what the setup and the evaluator read from the asset cache."""
    setup_steps: tuple[str, ...]
    """Types that are not built in, as with getters and metrics."""
    getters: tuple[str, ...]
    metrics: tuple[str, ...]


def task_needs(task: Task) -> Needs:
    """The needs of a task.

    Raises:
        UserError: a parameter that they follow from has another form than OSWorld's.
    """
    steps = (*task.config, *task.evaluator.postconfig)
    checks = [check for check in task.evaluator.checks if check.func != "infeasible"]
    items = [item for check in checks for item in check.items]
    return Needs(
        applications=_sorted(_application(name) for name in task.related_apps if _application(name)),
        programs=_sorted(_programs(task, steps, items)),
        network=_sorted(_network(task, steps, items)),
        accounts=_sorted(_accounts(steps, items)),
        files=_sorted(_files(task, steps, items)),
        setup_steps=_sorted(step.type for step in steps if step.type not in STEPS),
        getters=_sorted(_unknown_getters(items)),
        metrics=_sorted(check.func for check in checks if check.func not in METRICS),
    )


def absent_files(task: Task, needs: Needs) -> tuple[str, ...]:
    """Of a task's files, those without a copy in the asset cache."""
    return tuple(url for url in needs.files if find_asset(task.id, url) is None)


def absent_applications(needs: Needs) -> tuple[str, ...]:
    """Of a task's applications, those of which this machine has no program."""

    def installed(name: str) -> bool:
        return any(shutil.which(program, path=_SYSTEM_PATH) for program in _PROGRAMS.get(name, (name,)))

    return tuple(name for name in needs.applications if not installed(name))


def absent_programs(needs: Needs) -> tuple[str, ...]:
    """Of the programs that a task's commands start, those that an embedded desktop on this machine does not find."""

    return tuple(name for name in needs.programs if shutil.which(name, path=_DESKTOP_PATH) is None)


def unsupported(task: Task, needs: Needs | None = None) -> list[str]:
    """Why this task cannot be played from here whatever its desktop has, one line each; empty if it can."""
    needs = needs or task_needs(task)
    judged = is_official(task)
    return [
        *(f"setup step {name} is not built in" for name in needs.setup_steps),
        *(f"metric {name} is not built in" for name in needs.metrics if not judged),
        *(f"getter {name} is not built in" for name in needs.getters if not judged),
        *(f"no local copy of {url}" for url in absent_files(task, needs)),
    ]


def _application(name: str) -> str:
    """The one name of an application; empty if it is none."""
    plain = "_".join(name.lower().split())
    plain = _OTHER_NAMES.get(plain, plain)
    return "" if plain in _NO_APPLICATION else plain


def _programs(task: Task, steps: Iterable[TypedItem], items: Iterable[TypedItem]) -> Iterator[str]:
    commanding = [step for step in steps if step.type in _COMMAND_STEPS]
    for item in (*commanding, *(item for item in items if "command" in item.parameters)):
        command = item.parameters.get("command")
        words = _words(task, item)
        if isinstance(command, str):
            yield from _SHELL_PROGRAMS.intersection(_COMMAND_STARTS.findall(command))
        elif words and not words[0].startswith("."):
            yield words[0]
            if words[1:2] == ["-c"]:
                yield from _SHELL_PROGRAMS.intersection(_COMMAND_STARTS.findall(words[-1]))


def _network(task: Task, steps: Iterable[TypedItem], items: Iterable[TypedItem]) -> Iterator[str]:
    if task.proxy:
        yield "pages behind a proxy"
    for step in steps:
        match step.type:
            case "chrome_open_tabs":
                urls = _strings(task, step, step.parameters.get("urls_to_open"), "urls_to_open")
                yield from (f"opens {host}" for host in map(_host, urls) if host)
            case "launch":
                yield from (f"opens {host}" for host in map(_host, _words(task, step)) if host)
            case kind if kind in _COMMAND_STEPS and _FETCHES.search(" ".join(_words(task, step))):
                yield "a command fetches packages or files"
            case kind if kind in _ACCOUNT_STEPS:
                yield f"setup step {kind}"
    for item in items:
        if item.type in _WEB_GETTERS or item.type in _ACCOUNT_GETTERS:
            yield f"getter {item.type}"


def _accounts(steps: Iterable[TypedItem], items: Iterable[TypedItem]) -> Iterator[str]:
    for step in steps:
        if step.type == "login" and step.parameters.get("platform") != "googledrive":
            yield str(step.parameters.get("platform"))
        elif step.type in _ACCOUNT_STEPS:
            yield "google"
    if any(item.type in _ACCOUNT_GETTERS for item in items):
        yield "google"


def _files(task: Task, steps: Iterable[TypedItem], items: Iterable[TypedItem]) -> Iterator[str]:
    for step in steps:
        if step.type == "download":
            files = step.parameters.get("files")
            if not isinstance(files, list) or not all(isinstance(file, dict) for file in files):
                _refuse(task, step, "files", "is no list of objects")
            yield from _strings(task, step, [file.get("url") for file in files], "files.url")
    for item in items:
        if item.type == "cloud_file":
            path = item.parameters.get("path")
            yield from _strings(task, item, path if isinstance(path, list) else [path], "path")


def _unknown_getters(items: Iterable[TypedItem]) -> Iterator[str]:
    for item in items:
        if item.type not in GETTERS:
            yield item.type
        elif item.parameters.get("multi"):
            yield f"{item.type} for several files"


def _words(task: Task, item: TypedItem) -> list[str]:
    """A command, in words."""
    command = item.parameters.get("command")
    return command.split() if isinstance(command, str) else _strings(task, item, command, "command")


def _strings(task: Task, item: TypedItem, values: Any, key: str) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        _refuse(task, item, key, "is no text or list of texts")
    return list(values)


def _refuse(task: Task, item: TypedItem, key: str, reason: str) -> NoReturn:
    raise UserError(f"task {task.id}: {item.type}: {key}: {reason}", "mend the task file")


def _host(word: str) -> str:
    """The live host that a web address names; empty for any other word, and for this machine's own pages."""
    if not word.startswith(("http://", "https://")):
        return ""
    host = urlsplit(word).hostname or ""
    return "" if host in _HERE else host


def _sorted(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(names)))
