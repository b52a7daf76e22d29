"""Demonstrations on disk: their data model, writer and reader.

A demonstration is one folder:

    demonstration.json      the object below
    screenshots/0000.png    screenshot before action 0, at the full size of the screen
    screenshots/0001.png    ...

Keys of demonstration.json:

    format_version      1
    task_id             id of the task
    application         application of the task, as in task lists; may be empty
    instruction         instruction as it was shown to the player
    task                task file (JSON object); {} if it is unknown
    seed                seed of the episode
    screen_size         [width, height] in pixels
    source              what made the demonstration, such as "deskrl record"
    deskrl_version      version of deskrl that wrote the folder
    recorded_unix_s     time at which the episode began, in seconds since 1970
    reward              reward in [0, 1]; null without one
    evidence            evidence for the reward (any JSON value)
    termination         reason why the episode ended: a name of `Termination` in rollout.proto in lower case, such as
                        "finished", "infeasible" or "step_limit"; "" if it did not come to an end
    fault               why the episode has no reward; "" with a reward
    final_screenshot    screenshot of the end state; null without one, or if the last step's screenshot shows it
    steps               array of steps: `action` (record of `actions.Action`, in pixels of the screen), `player`
                        ("person" or "policy"), `screenshot` (path in the folder), `time_s` (time of the action in
                        seconds since the episode began), `thought` (may be empty)
"""

from __future__ import annotations

import errno
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

from deskrl.actor.actions import Action
from deskrl.actor.guest.keysyms import key_name
from deskrl.actor.image_decoding import ImageError, decode_image
from deskrl.core.errors import UserError
from deskrl.core.file_io import open_regular_file, report_write_errors, write_json

FORMAT_VERSION = 1
"""Version of the layout; a reader rejects others."""
FILE_NAME = "demonstration.json"
SCREENSHOTS_DIR = "screenshots"

_SCREENSHOT = re.compile(rf"{SCREENSHOTS_DIR}/\d{{4,9}}\.png")
_MAX_BYTES = 64 * 1024**2
"""Largest file that is read."""
_HINT = "give a folder that deskrl record or deskrl data has written"


class Player(StrEnum):
    """Who chose an action."""

    PERSON = "person"
    POLICY = "policy"


@dataclass(frozen=True)
class DemonstrationStep:
    """One action with the screenshot before it."""

    action: Action
    player: Player
    screenshot: str
    """Path of the PNG file relative to the folder of the demonstration, as `screenshot_name` returns it."""
    time_s: float
    """Time of the action in seconds since the episode began."""
    thought: str = ""


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """Content of demonstration.json; the module describes the keys."""

    task_id: str
    instruction: str
    seed: int
    screen_size: tuple[int, int]
    source: str
    deskrl_version: str
    steps: tuple[DemonstrationStep, ...]
    reward: float | None
    termination: str
    application: str = ""
    task: dict[str, Any]
    recorded_unix_s: float = 0.0
    evidence: Any = None
    fault: str = ""
    final_screenshot: str | None = None


def screenshot_name(number: int) -> str:
    """Return the path of screenshot `number`, counted from 0, relative to the folder of the demonstration."""
    return f"{SCREENSHOTS_DIR}/{number:04d}.png"


def create_folder(folder: Path) -> None:
    """Create the folder of a new demonstration with its parents.

    Raises:
        UserError: it exists, or cannot be created.
    """
    try:
        folder.mkdir(parents=True)
        (folder / SCREENSHOTS_DIR).mkdir()
    except FileExistsError as error:
        raise UserError(f"{folder}: exists", "choose another folder, or remove this one") from error
    except OSError as error:
        raise UserError(f"{folder}: cannot be created: {error.strerror}", "choose another folder") from error


def write_screenshot(folder: Path, number: int, png: bytes) -> str:
    """Write a screenshot (a PNG file) into the folder of a demonstration, and return its name.

    Raises:
        UserError: it cannot be written.
    """
    name = screenshot_name(number)
    with report_write_errors(folder / name):
        (folder / name).write_bytes(png)
    return name


def write_demonstration(folder: Path, demonstration: Demonstration) -> None:
    """Write demonstration.json, in place of an earlier one; its screenshots are written before.

    Raises:
        UserError: it cannot be written.
    """
    record = {field.name: getattr(demonstration, field.name) for field in fields(demonstration)}
    steps = [
        {
            "action": step.action.to_record(),
            "player": step.player,
            "screenshot": step.screenshot,
            "time_s": step.time_s,
            "thought": step.thought,
        }
        for step in demonstration.steps
    ]
    with report_write_errors(folder / FILE_NAME):
        write_json(folder / FILE_NAME, {"format_version": FORMAT_VERSION, **record, "steps": steps})


def read_demonstration(folder: Path) -> Demonstration:
    """Read and validate a demonstration; its screenshots are read by `read_screenshot`.

    Raises:
        UserError: the file is missing or invalid, has another format version, or names a screenshot that is missing.
    """
    path = folder / FILE_NAME
    try:
        data = _read_bounded(path)
        version = msgspec.json.decode(data, type=_Header).format_version
        if version != FORMAT_VERSION:
            raise UserError(f"{path}: format version {version}, not {FORMAT_VERSION}", "update deskrl")
        demonstration = msgspec.json.decode(data, type=Demonstration)
    except FileNotFoundError as error:
        raise UserError(f"{path}: not found", _HINT) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}", _HINT) from error
    except (msgspec.MsgspecError, RecursionError) as error:
        raise UserError(f"{path}: not a demonstration: {error}", _HINT) from error
    if (problem := next(_problems(folder, demonstration), None)) is not None:
        raise UserError(f"{path}: {problem}", _HINT)
    return demonstration


def read_screenshot(folder: Path, demonstration: Demonstration, name: str) -> bytes:
    """Return the PNG file of a screenshot of a demonstration after checking it.

    Raises:
        UserError: the file cannot be read, is not a complete PNG file, or does not have the size of the screen.
    """
    path = folder / name
    try:
        data = _read_bounded(path)
        size = decode_image(data, ("PNG",)).size
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}", "restore the file from a copy") from error
    except ImageError as error:
        raise UserError(f"{path}: {error}", "restore the file from a copy") from error
    if size != demonstration.screen_size:
        width, height = demonstration.screen_size
        raise UserError(f"{path}: {size[0]} x {size[1]} pixels, but the screen has {width} x {height}", _HINT)
    return data


def find_demonstrations(root: Path) -> list[Path]:
    """Return the folders of all demonstrations in a folder, which may be one itself, sorted by path.

    Raises:
        UserError: there are none.
    """
    folders = sorted(path.parent for path in root.rglob(FILE_NAME))
    if not folders:
        raise UserError(f"{root}: contains no demonstrations ({FILE_NAME})", _HINT)
    return folders


def _read_bounded(path: Path) -> bytes:
    """Return the content of a file; raises OSError also if it is not a regular file, or too large."""
    with open_regular_file(path) as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise OSError(errno.EFBIG, f"it has more than {_MAX_BYTES} bytes", str(path))
    return data


class _Header(msgspec.Struct):
    format_version: int


def _problems(folder: Path, demonstration: Demonstration) -> Iterator[str]:
    """Yield what the types do not express."""
    width, height = demonstration.screen_size
    if width < 1 or height < 1:
        yield f"screen_size: {width} x {height}"
    if demonstration.reward is not None and not 0 <= demonstration.reward <= 1:
        yield f"reward: {demonstration.reward:g} is not between 0 and 1"
    names = [step.screenshot for step in demonstration.steps]
    if demonstration.final_screenshot is not None:
        names.append(demonstration.final_screenshot)
    for name in names:
        if not _SCREENSHOT.fullmatch(name):
            yield f"{name[:80]!r} cannot be the name of a screenshot"
        elif not (folder / name).is_file():
            yield f"{name} does not exist"
        elif not (folder / name).resolve().is_relative_to(folder.resolve()):
            yield f"{name} is a link to a file outside the folder"
    for number, step in enumerate(demonstration.steps):
        action = step.action
        points = [(action.x, action.y), (action.end_x, action.end_y)] if action.has_point else []
        if not all(0 <= x < width and 0 <= y < height for x, y in points):
            yield f"steps[{number}]: the action is outside the screen of {width} x {height} pixels"
        if unknown := [key for key in action.keys if key_name(key) != key]:
            yield f"steps[{number}]: unknown key {unknown[0][:20]!r}"
        if not (0 <= action.seconds < math.inf and action.repeat >= 1):
            yield f"steps[{number}]: {action.seconds:g} s, {action.repeat} times"
        if action.ends_episode and number + 1 != len(demonstration.steps):
            yield f"steps[{number}]: {action.kind} is not the last action"
