"""Requirements of tasks: applications, programs, capabilities, network, accounts, files, setup steps and evaluators.

`task_requirements` depends only on the task file and on the built-in setup steps, getters and metrics.
`missing_files` and `missing_local_files` check requirements against the asset cache and the file system,
`missing_applications`, `missing_programs` and `missing_capabilities` against what an embedded desktop has on this
machine.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from deskrl.actor.miniwob.page_files import page_path
from deskrl.actor.task import Task, TypedItem
from deskrl.actor.tasks.assets import cloud_file_names, find_asset
from deskrl.actor.tasks.evaluators import GETTERS, METRICS, has_osworld_evaluator
from deskrl.actor.tasks.parameter_schemas import GETTER_SCHEMAS, STEP_SCHEMAS, ItemSchema, parameter_error
from deskrl.actor.tasks.setup_steps import STEPS
from deskrl.actor.tasks.task_schema import METRICS_WITHOUT_RESULT
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
"""Names of the program of an application, one of which suffices; for other applications, the application's name."""

_ALIASES = {
    "browser": "chrome",
    "calc": "libreoffice_calc",
    "ubuntu_media_player": "vlc",
    "vscode": "vs_code",
    "writer": "libreoffice_writer",
}
_NOT_APPLICATIONS = {"image", "os", "pdf"}  # related_apps also contains kinds of files and the desktop itself

_SHELL_PROGRAMS = {
    *("code", "gedit", "gimp", "gnome-terminal", "google-chrome", "libreoffice", "nautilus", "soffice", "thunderbird"),
    *("bc", "gio", "git", "gsettings", "jq", "notify-send", "pactl", "pip", "pulseaudio", "python", "python3", "socat"),
    *("sudo", "timedatectl", "unzip", "vlc", "wmctrl", "xsel", "zip"),
}
"""Programs that are searched for in shell commands: OSWorld's guest has them, a minimal system may not."""

_COMMAND_STARTS = re.compile(r"(?:^|[|;&\n(]|\bsudo(?:\s+-\S+)*)\s*(?:\w+=\S*\s+)*([\w.-]+)")
_SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/games"
_DESKTOP_PATH = f"{Path(__file__).parents[1] / 'guest' / 'bin'}:{_SYSTEM_PATH}"

_COMMAND_STEPS = ("command", "execute", "execute_with_verification", "launch", "setup_script")
_ACCOUNT_STEPS = ("googledrive", "login")
_NETWORK_STEPS = (*_ACCOUNT_STEPS, "proxy")
_ACCOUNT_GETTERS = ("googledrive_file",)
_WEB_GETTERS = {"gotoRecreationPage_and_get_html_content", "info_from_website", "page_info", "pdf_from_url"}
_BROWSER_GETTERS = {
    *("active_tab_html_parse", "active_tab_info", "active_tab_url_parse", "active_url_from_accessTree", "bookmarks"),
    *("history", "macys_product_url_parse", "number_of_search_results", "open_tabs_info", "url_dashPart"),
    "url_path_parse",
}
"""Getters of what the browser shows: with them, URLs in rules are those of pages that the policy must open."""
_DOWNLOAD_COMMANDS = re.compile(
    r"\b(?:apt|apt-get)\s+(?:-\S+\s+)*(?:install|update)\b"
    r"|\bpip3?\s+install\s+(?:-\S+\s+)*(?![-./~])"
    r"|\b(?:curl|wget|git\s+clone)\s+\S"
)
_LOCAL_HOSTS = {"", "localhost", "127.0.0.1", "::1"}

_ROOT_PRIVILEGES, _TRASH = "root privileges", "trash"
_INSTALLED_COMMANDS = re.compile(r"\bwhich\s+\S|\bdpkg\s+-[ls]\b|\b(?:apt|snap)\s+list\b")
"""Commands of getters that show what is installed: the policy must install it."""
_COMMAND_CAPABILITIES = {
    _ROOT_PRIVILEGES: re.compile(
        r"\b(?:sudo|pkexec|useradd|adduser|usermod|chpasswd|visudo|systemctl|hostnamectl|modprobe)\b"
        r"|\b(?:apt|apt-get)\s+(?:-\S+\s+)*(?:install|remove|purge|update|upgrade)\b|\bsnap\s+(?:install|remove)\b"
        r"|\btimedatectl\s+set|\{CLIENT_PASSWORD\}"
    ),
    "GNOME settings": re.compile(r"\borg\.gnome\.\w"),
    _TRASH: re.compile(r"\bgio\s+trash\b|\btrash-(?:put|list|empty|restore)\b|trash:/|\.local/share/Trash"),
}
_STEP_CAPABILITIES = {"change_wallpaper": "wallpaper", "proxy": _ROOT_PRIVILEGES}
_GETTER_CAPABILITIES = {
    "accessibility_tree": "accessibility tree",
    "active_url_from_accessTree": "accessibility tree",
    "vm_terminal_output": "text of the terminal",
    "vm_wallpaper": "wallpaper",
}
_TRASH_DAEMONS = ("/usr/libexec/gvfsd-trash", "/usr/lib/gvfs/gvfsd-trash")


@dataclass(frozen=True)
class Requirements:
    """Requirements of one task. Each tuple is sorted, without duplicates, and empty if nothing is required."""

    applications: tuple[str, ...]
    """Applications by their canonical names, whatever aliases task files use."""
    programs: tuple[str, ...]
    """Programs that the task's commands start, as far as this can be derived from the commands."""
    network: tuple[str, ...]
    """Reasons why the desktop or the evaluator must reach the internet."""
    accounts: tuple[str, ...]
    """Services for which an account is required."""
    files: tuple[str, ...]
    """URLs of the files that setup and evaluator read from the asset cache."""
    setup_steps: tuple[str, ...]
    """Types of setup steps that are not built in."""
    getters: tuple[str, ...]
    """Types of getters that are not built in."""
    metrics: tuple[str, ...]
    """Names of metrics that are not built in."""
    local_files: tuple[str, ...] = ()
    """Paths of files of this machine that setup steps or getters read."""
    capabilities: tuple[str, ...] = ()
    """Capabilities of the desktop beyond programs: root privileges, trash, GNOME, and what its guest server reads."""


def task_requirements(task: Task) -> Requirements:
    """Return the requirements of a task.

    Raises:
        UserError: a parameter of a setup step or getter is missing or does not have OSWorld's format.
    """
    steps = (*task.config, *task.evaluator.postconfig)
    checks = [check for check in task.evaluator.checks if check.func not in METRICS_WITHOUT_RESULT]
    items = [item for check in checks for item in check.items]
    _check_parameters(task, steps, STEP_SCHEMAS)
    _check_parameters(task, items, GETTER_SCHEMAS)
    return Requirements(
        applications=_sorted(_application(name) for name in task.related_apps if _application(name)),
        programs=_sorted(_programs(steps, items)),
        network=_sorted(_network(task, steps, items)),
        accounts=_sorted(_accounts(steps, items)),
        files=_sorted(_files(steps, items)),
        setup_steps=_sorted(step.type for step in steps if step.type not in STEPS),
        getters=_sorted(_unknown_getters(items)),
        metrics=_sorted(check.func for check in checks if check.func not in METRICS),
        local_files=_sorted(_local_files(steps, items)),
        capabilities=_sorted(_capabilities(steps, items)),
    )


def missing_files(task: Task, required: Requirements) -> tuple[str, ...]:
    """Return the URLs of required files without a copy in the asset cache."""
    copied_as = cloud_file_names(task)
    return tuple(url for url in required.files if find_asset(task.id, url, copied_as.get(url)) is None)


def missing_local_files(required: Requirements) -> tuple[str, ...]:
    """Return the required files of this machine that do not exist."""
    return tuple(path for path in required.local_files if not Path(path).is_file())


def missing_capabilities(required: Requirements) -> tuple[str, ...]:
    """Return the required capabilities that an embedded desktop on this machine does not have."""
    has_trash = any(Path(daemon).exists() for daemon in _TRASH_DAEMONS)
    return tuple(name for name in required.capabilities if name != _TRASH or not has_trash)


def missing_applications(required: Requirements) -> tuple[str, ...]:
    """Return the required applications that are not installed on this machine."""

    def is_installed(name: str) -> bool:
        return any(shutil.which(program, path=_SYSTEM_PATH) for program in _PROGRAMS.get(name, (name,)))

    return tuple(name for name in required.applications if not is_installed(name))


def missing_programs(required: Requirements) -> tuple[str, ...]:
    """Return the programs of the task's commands that an embedded desktop on this machine does not find."""
    return tuple(name for name in required.programs if shutil.which(name, path=_DESKTOP_PATH) is None)


def unsupported_reasons(task: Task, required: Requirements | None = None) -> list[str]:
    """Return why a task cannot run on any desktop, one line per reason; empty if it can.

    Args:
        task: task to examine.
        required: requirements of the task; None: derive them.
    """
    required = required or task_requirements(task)
    can_evaluate = has_osworld_evaluator(task)
    return [
        *(f"setup step {name} is not built in" for name in required.setup_steps),
        *(f"metric {name} is not built in" for name in required.metrics if not can_evaluate),
        *(f"getter {name} is not built in" for name in required.getters if not can_evaluate),
        *(f"no local copy of {url}" for url in missing_files(task, required)),
        *(f"{path}: not found" for path in missing_local_files(required)),
    ]


def _application(name: str) -> str:
    """Return the canonical name of an application; empty if the name does not denote an application."""
    plain = "_".join(name.lower().split())
    plain = _ALIASES.get(plain, plain)
    return "" if plain in _NOT_APPLICATIONS else plain


def _programs(steps: Iterable[TypedItem], items: Iterable[TypedItem]) -> Iterator[str]:
    command_steps = [step for step in steps if step.type in _COMMAND_STEPS]
    for item in (*command_steps, *(item for item in items if "command" in item.parameters)):
        command = item.parameters["command"]
        words = _words(item)
        if isinstance(command, str):
            yield from _SHELL_PROGRAMS.intersection(_COMMAND_STARTS.findall(command))
        elif words and not words[0].startswith("."):
            yield words[0]
            if words[1:2] == ["-c"]:
                yield from _SHELL_PROGRAMS.intersection(_COMMAND_STARTS.findall(words[-1]))


def _network(task: Task, steps: Iterable[TypedItem], items: Sequence[TypedItem]) -> Iterator[str]:
    if task.proxy:
        yield "pages behind a proxy"
    for step in steps:
        match step.type:
            case "chrome_open_tabs":
                yield from (f"opens {host}" for host in map(_host, step.parameters["urls_to_open"]) if host)
            case "launch":
                yield from (f"opens {host}" for host in map(_host, _words(step)) if host)
            case kind if kind in _COMMAND_STEPS and _DOWNLOAD_COMMANDS.search(" ".join(_words(step))):
                yield "a command fetches packages or files"
            case kind if kind in _NETWORK_STEPS:
                yield f"setup step {kind}"
    reads_browser = any(item.type in _BROWSER_GETTERS for item in items)
    for item in items:
        if item.type == "rule" and reads_browser:
            hosts = map(_host, _texts_in(item.parameters["rules"]))
            yield from (f"expects a page of {host}" for host in hosts if host)
        elif item.type in _WEB_GETTERS or item.type in _ACCOUNT_GETTERS:
            yield f"getter {item.type}"
        elif _DOWNLOAD_COMMANDS.search(" ".join(_words(item))):
            yield "a command fetches packages or files"
        elif item.type != "check_script" and _INSTALLED_COMMANDS.search(" ".join(_words(item))):
            yield "the policy installs a program"


def _capabilities(steps: Iterable[TypedItem], items: Iterable[TypedItem]) -> Iterator[str]:
    for kind, capabilities in ((steps, _STEP_CAPABILITIES), (items, _GETTER_CAPABILITIES)):
        for item in kind:
            if item.type in capabilities:
                yield capabilities[item.type]
            words = " ".join((*_words(item), *_paths(item)))
            yield from (name for name, pattern in _COMMAND_CAPABILITIES.items() if pattern.search(words))
    commands = [" ".join(_words(item)) for item in items if item.type != "check_script"]
    if any(_INSTALLED_COMMANDS.search(command) or "timedatectl" in command for command in commands):
        yield _ROOT_PRIVILEGES  # to install the program, or to set the time zone


def _local_files(steps: Iterable[TypedItem], items: Iterable[TypedItem]) -> Iterator[str]:
    for step in steps:
        if step.type == "upload_file":
            yield from (file["local_path"] for file in step.parameters["files"] if "local_path" in file)
        elif step.type == "miniwob":
            yield str(page_path(Path(step.parameters["html"]), step.parameters["page"]))
    for item in (*steps, *items):
        if item.type in (*_ACCOUNT_STEPS, *_ACCOUNT_GETTERS):
            yield item.parameters["settings_file"]


def _accounts(steps: Iterable[TypedItem], items: Iterable[TypedItem]) -> Iterator[str]:
    for step in steps:
        if step.type == "login" and step.parameters.get("platform") != "googledrive":
            yield str(step.parameters.get("platform"))
        elif step.type in _ACCOUNT_STEPS:
            yield "google"
    if any(item.type in _ACCOUNT_GETTERS for item in items):
        yield "google"


def _files(steps: Iterable[TypedItem], items: Iterable[TypedItem]) -> Iterator[str]:
    for step in steps:
        if step.type == "download":
            yield from (file["url"] for file in step.parameters["files"])
    for item in items:
        if item.type == "cloud_file":
            path = item.parameters["path"]
            yield from [path] if isinstance(path, str) else path


def _unknown_getters(items: Iterable[TypedItem]) -> Iterator[str]:
    for item in items:
        if item.type not in GETTERS:
            yield item.type
        elif item.parameters.get("multi"):
            yield f"{item.type} for several files"


def _words(item: TypedItem) -> list[str]:
    """Return the words of the command of a step or getter; empty if it has none."""
    command = item.parameters.get("command", [])
    return command.split() if isinstance(command, str) else [str(word) for word in command]


def _paths(item: TypedItem) -> list[str]:
    """Return the paths in the guest that a step or getter names."""
    path = item.parameters.get("path", [])
    files = item.parameters.get("files", [])
    return [path] if isinstance(path, str) else [*map(str, path), *(str(file.get("path")) for file in files)]


def _check_parameters(task: Task, items: Iterable[TypedItem], schemas: Mapping[str, ItemSchema]) -> None:
    for item in items:
        error = parameter_error(item, schemas)
        if error is not None:
            raise UserError(f"task {task.id}: {item.type}: {error[0]}: {error[1]}", "correct the task file")


def _texts_in(value: Any) -> Iterator[str]:
    """Yield all strings in a nested JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts_in(item)


def _host(word: str) -> str:
    """Return the remote host of a URL; empty for any other word and for local URLs."""
    if not word.startswith(("http://", "https://")):
        return ""
    try:
        host = urlsplit(word).hostname or ""
    except ValueError:
        return ""
    return "" if host in _LOCAL_HOSTS else host


def _sorted(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(names)))
