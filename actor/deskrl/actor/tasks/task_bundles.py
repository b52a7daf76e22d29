"""Task bundles: folders with an instruction, files, a setup script and a check, translated to task files.

A bundle is a folder `<id>` with these files (* required):

    task.toml*   instruction and settings (`BundleSettings`)
    files/       files that are uploaded to the home of the desktop's user before the setup, `files/a/b` as `~/a/b`
    setup.sh     shell script that brings the desktop to the initial state
    check.sh     shell script that judges the end state (`check_script`)
    reward.py    reward in Python instead of check.sh: defines `reward`, as any reward of the user's own

Exactly one of check.sh and reward.py exists. The translation contains everything but reward.py, so that rollouts carry
the bundle to desktops of any provider; the code of reward.py runs in the actor, which reads it from its own disk.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import Field, ValidationError

from deskrl.core.config import Section
from deskrl.core.config.config_errors import describe_problem
from deskrl.core.config.value_types import NonNegativeSeconds, PositiveSeconds
from deskrl.core.errors import UserError

SETTINGS_FILE, SETUP_FILE, CHECK_FILE, REWARD_FILE, FILES_FOLDER = (
    *("task.toml", "setup.sh", "check.sh", "reward.py"),
    "files",
)
"""Names in a bundle."""
MAX_SCRIPT_BYTES = 100 * 1024
"""Size limit of a script in bytes: it is one argument of a command, which the kernel limits to 128 KiB."""
MAX_FILES_BYTES = 1024**2
"""Size limit in bytes of the files of a bundle together: every rollout carries them."""
MAX_NUM_FILES = 1000
"""Limit on the number of files of a bundle."""

_SHELL = ["/bin/bash", "-c"]
_SYNTAX_TIMEOUT_S = 10.0
_HINT = "correct the bundle; docs/rewards.md describes its files"

Command = str | Annotated[tuple[str, ...], Field(min_length=1)]


class CheckSettings(Section):
    """How check.sh judges the end state."""

    reward: Literal["exit_status", "number"] = "exit_status"
    """`exit_status`: 0 is the reward 1.0, 1 to 125 is 0.0; `number`: with the exit status 0, the last line of the
    standard output is the reward, a number in [0, 1]; 1 to 125 is 0.0."""
    timeout_s: PositiveSeconds = 30.0
    """Timeout of the script; `desktop.evaluate_timeout_s` limits the whole evaluation."""
    session: bool = False
    """Run the script while the applications of the setup still run, with their windows. False: it runs alone over the
    files, so that only files are evidence."""
    within_s: NonNegativeSeconds = 0.0
    """Time during which a check below 1.0 is repeated, for applications that save with a delay."""


class BundleSettings(Section):
    """Content of task.toml."""

    instruction: str
    """What the policy is asked to do."""
    applications: tuple[str, ...] = ()
    """Applications and programs that the task needs; the first one is the task's domain. `terminal` and `os` let
    Ctrl+Alt+T open a terminal."""
    launch: tuple[Command, ...] = ()
    """Commands that start applications after setup.sh; the setup waits for their windows."""
    setup_timeout_s: PositiveSeconds = 30.0
    """Timeout of setup.sh; `desktop.setup_timeout_s` limits the whole setup."""
    check: CheckSettings = CheckSettings()
    """How check.sh judges the end state."""
    solution: tuple[dict[str, Any], ...] = ()
    """Steps of a scripted solution, as in a task file (`deskrl.solution`)."""


def is_bundle(folder: Path) -> bool:
    """Return whether a folder is a task bundle."""
    return (folder / SETTINGS_FILE).is_file()


def find_bundles(folder: Path) -> list[Path]:
    """Return the settings files of the bundles in a folder, sorted: of itself, else of its children and theirs."""
    if is_bundle(folder):
        return [folder / SETTINGS_FILE]
    return sorted([*folder.glob(f"*/{SETTINGS_FILE}"), *folder.glob(f"*/*/{SETTINGS_FILE}")])


def read_bundle(folder: Path) -> tuple[bytes, str]:
    """Return the task file that a bundle is equivalent to, and the domain of the task.

    Raises:
        UserError: a file is missing, unreadable, too large or invalid, or a link leaves the bundle.
    """
    folder = folder.absolute()
    settings = _read_settings(folder)
    scripts = {name: _read_script(folder, name) for name in (SETUP_FILE, CHECK_FILE)}
    has_reward_file = _is_file(folder, REWARD_FILE)
    if scripts[CHECK_FILE] is None and not has_reward_file:
        _fail(folder, f"has neither {CHECK_FILE} nor {REWARD_FILE}", "add the check that judges the end state")
    if scripts[CHECK_FILE] is not None and has_reward_file:
        _fail(folder, f"has both {CHECK_FILE} and {REWARD_FILE}", "remove one of them")
    if has_reward_file and "check" in settings.model_fields_set:
        _fail(folder / SETTINGS_FILE, f"check: the bundle has no {CHECK_FILE}", f"remove it: {REWARD_FILE} judges")
    record = {
        "id": folder.name,
        "instruction": settings.instruction,
        "source": "deskrl task bundle",
        "related_apps": list(settings.applications),
        "config": list(_setup_steps(folder, settings, scripts[SETUP_FILE])),
        "evaluator": _evaluator(settings.check, scripts[CHECK_FILE]),
        "deskrl": {"solution": list(settings.solution), "evaluate_within_s": settings.check.within_s},
    }
    domain = settings.applications[0] if settings.applications else folder.parent.name
    return (json.dumps(record, ensure_ascii=False, default=str) + "\n").encode(), domain


def _setup_steps(folder: Path, settings: BundleSettings, script: str | None) -> Iterator[dict[str, Any]]:
    if files := [_uploaded(path, name) for name, path in _files(folder)]:
        yield {"type": "upload_file", "parameters": {"files": files}}
    if script is not None:
        parameters = {"command": [*_SHELL, script], "timeout_s": settings.setup_timeout_s}
        yield {"type": "setup_script", "parameters": parameters}
    for command in settings.launch:
        words = command if isinstance(command, str) else list(command)
        yield {"type": "launch", "parameters": {"command": words, "shell": isinstance(command, str)}}


def _evaluator(check: CheckSettings, script: str | None) -> dict[str, Any]:
    if script is None:
        return {"func": "reward_file"}
    result = {
        "type": "check_script",
        "command": [*_SHELL, script],
        "session": check.session,
        "timeout_s": check.timeout_s,
    }
    return {"func": "script_reward", "result": result, "options": {"reward": check.reward}}


def _read_settings(folder: Path) -> BundleSettings:
    path = folder / SETTINGS_FILE
    if not folder.name.isprintable() or "/" in folder.name or not folder.name.strip():
        _fail(folder, "its name cannot be a task id", "give the folder a printable name")
    try:
        settings = BundleSettings.model_validate(tomllib.loads(_read_text(folder, path, MAX_SCRIPT_BYTES)))
    except tomllib.TOMLDecodeError as error:
        _fail(path, f"not valid TOML: {error}", _HINT)
    except ValidationError as error:
        problems = [describe_problem(item, ".".join(map(str, item["loc"]))) for item in error.errors()]
        _fail(path, "; ".join(problems), f"its keys are {', '.join(BundleSettings.model_fields)}")
    if not settings.instruction.strip():
        _fail(path, "instruction: is empty", "say what the policy is asked to do")
    return settings


def _read_script(folder: Path, name: str) -> str | None:
    """Return a script, which must be valid for bash; None if it does not exist."""
    if not _is_file(folder, name):
        return None
    text = _read_text(folder, folder / name, MAX_SCRIPT_BYTES)
    if not text.strip() or "\0" in text:
        _fail(folder / name, "is empty" if not text.strip() else "contains a null character", _HINT)
    if shutil.which(_SHELL[0]) is not None:
        command = [_SHELL[0], "-n", "-c", text]
        parsed = subprocess.run(command, capture_output=True, text=True, timeout=_SYNTAX_TIMEOUT_S, check=False)
        if parsed.returncode != 0:
            reason = (parsed.stderr.strip().splitlines() or ["unknown"])[0].removeprefix(f"{_SHELL[0]}: ")
            _fail(folder / name, f"bash cannot parse it: {reason[:200]}", "correct the script")
    return text


def _files(folder: Path) -> list[tuple[str, Path]]:
    """Return names and paths of the files to upload, sorted."""
    root = folder / FILES_FOLDER
    if not root.is_dir():
        if root.exists() or root.is_symlink():
            _fail(root, "is not a folder", _HINT)
        return []
    _check_inside(folder, root)
    found: list[Path] = []
    for parent, folders, names in os.walk(root, onerror=_raise_unreadable):
        if links := [name for name in folders if Path(parent, name).is_symlink()]:
            _fail(Path(parent, links[0]), "is a link to a folder", "replace it by a folder with the files")
        found += [Path(parent, name) for name in names]
        if len(found) > MAX_NUM_FILES:
            _fail(root, f"has more than {MAX_NUM_FILES} files", "create them in setup.sh")
    named = sorted((str(path.relative_to(root)), path) for path in found)
    for name, path in named:
        if not name.isprintable():
            _fail(root, f"{name!r} is not a printable name", "rename the file")
        _check_regular(folder, path)
    total = sum(path.stat().st_size for _, path in named)
    if total > MAX_FILES_BYTES:
        largest = max((path for _, path in named), key=lambda path: path.stat().st_size)
        reason = f"{total} bytes in files exceed the limit of {MAX_FILES_BYTES}; the largest is {largest}"
        _fail(root, reason, "generate large files in setup.sh, or put them on the desktops")
    return named


def _uploaded(path: Path, name: str) -> dict[str, str]:
    """Return the item of `upload_file` for a file: text as it is, so that it can be searched, other data in Base64."""
    data = _read_bytes(path)
    try:
        return {"path": f"~/{name}", "content": data.decode()}
    except UnicodeDecodeError:
        return {"path": f"~/{name}", "base64": base64.b64encode(data).decode()}


def _is_file(folder: Path, name: str) -> bool:
    path = folder / name
    if not path.exists() and not path.is_symlink():
        return False
    _check_regular(folder, path)
    return True


def _read_text(folder: Path, path: Path, max_bytes: int) -> str:
    _check_regular(folder, path)
    if (num_bytes := path.stat().st_size) > max_bytes:
        _fail(path, f"{num_bytes} bytes exceed the limit of {max_bytes}", "make it shorter")
    try:
        return _read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: {error.reason} at byte {error.start}", _HINT) from error


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}", "make the file readable") from error


def _check_regular(folder: Path, path: Path) -> None:
    """Check that a path is a regular file of the bundle, possibly by a link."""
    _check_inside(folder, path)
    if not path.is_file():
        _fail(path, "is not a regular file", "replace or remove it")


def _check_inside(folder: Path, path: Path) -> None:
    if not path.resolve().is_relative_to(folder.resolve()):
        _fail(path, f"is a link that leaves the bundle: {os.readlink(path) if path.is_symlink() else path.resolve()}")


def _raise_unreadable(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read: {error.strerror}", "make the folder readable") from error


def _fail(path: Path, reason: str, hint: str = "copy the file into the bundle") -> NoReturn:
    raise UserError(f"{path}: {reason}", hint)
