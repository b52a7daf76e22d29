"""Form in which the readers of all formats return episodes, and bounded reads of the files that these name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deskrl.actor.agent.action_language import PolicyResponse
from deskrl.actor.demonstrations import Player
from deskrl.core.errors import UserError
from deskrl.core.file_io import open_regular_file
from deskrl.core.left_out import LeftOut

MAX_FILE_BYTES = 64 * 1024**2
"""Largest screenshot file that is read."""
MAX_LINE_BYTES = 64 * 1024**2
"""Largest line of a JSONL file that is read."""
_THOUGHT = re.compile(r"^(?:#{1,4} ?)?Thought ?:(.*?)(?=^(?:#{1,4} ?)?(?:Action|Code) ?:|\Z)", re.M | re.S)


class UnreadableError(Exception):
    """A part of a source that cannot be imported.

    Args:
        reason: why, without anything that differs from one to the next.
        detail: what is wrong with this one; empty if the reason says it.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class RecordedStep:
    """One step of a source, which is decoded only when it is written."""

    name: str
    """Where it is, for reports."""
    read_screenshot: Callable[[], bytes]
    """Return the encoded screenshot before the action; raises UnreadableError."""
    read_action: Callable[[tuple[int, int]], PolicyResponse]
    """Return the action in pixels of a screenshot of this (width, height).

    Raises:
        FormatError, UnreadableError: it is not an action that deskrl has.
    """
    thought: str = ""
    player: Player = Player.POLICY
    time_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RecordedEpisode:
    """One episode of a source."""

    name: str
    """Where it is, for reports."""
    task_id: str
    instruction: str
    source: str
    steps: Sequence[RecordedStep]
    reward: float | None
    """Reward in [0, 1]; None if the source has none."""
    application: str = ""
    task: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    termination: str = ""
    evidence: Any = None


def read_inside(folders: Sequence[Path], name: str) -> bytes:
    """Return a screenshot that a source names, from the first of these folders that has it.

    Raises:
        UnreadableError: the path leaves the folder, or the file is missing, too large, unreadable or not a regular one.
    """
    shown = name[-80:]
    try:
        folder = next((folder for folder in folders if (folder / name).is_file()), None)
        if folder is None:
            raise UnreadableError("its screenshot does not exist", shown)
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise UnreadableError("the path of its screenshot leaves the folder", shown)
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UnreadableError(f"its screenshot has more than {MAX_FILE_BYTES} bytes", shown)
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise UnreadableError("its screenshot cannot be read", shown) from error


def read_lines(path: Path, left_out: LeftOut) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number, from 1, and the JSON object of each line of a file; damaged lines are counted.

    Raises:
        UserError: the file cannot be read.
    """
    number = 0
    try:
        with open_regular_file(path) as file:
            while line := file.readline(MAX_LINE_BYTES):
                number += 1
                name = f"{path.name}:{number}"
                if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                    left_out.add("line", f"it has more than {MAX_LINE_BYTES} bytes", name)
                    while (line := file.readline(MAX_LINE_BYTES)) and not line.endswith(b"\n"):
                        pass
                    continue
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError):
                    left_out.add("line", "it is not valid JSON", name)
                    continue
                if isinstance(value, dict):
                    yield number, value
                else:
                    left_out.add("line", "it is not a JSON object", name)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror}", "give a folder or file that can be read"
        ) from error


def text_of(record: dict[str, Any], key: str) -> str:
    """Return a text of a JSON object; empty if it is missing or is not a text that UTF-8 can encode."""
    value = record.get(key)
    if not isinstance(value, str):
        return ""
    return value.encode(errors="replace").decode()


def find_thought(text: str) -> str:
    """Return the section "Thought:" of an output of a model; empty if there is none."""
    found = _THOUGHT.search(text)
    return "" if found is None else found[1].strip()
