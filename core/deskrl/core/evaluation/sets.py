"""Which tasks an evaluation plays: one set, or several that are told apart, each with a name and a folder.

A set is a task list, its noisy variants, or the tasks of the configuration. Where there is one, its folder is the
evaluation's own; each of several has `sets/NAME` below that, which reads as an evaluation by itself. Plays nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError

_FOLDER = "sets"
_NOISY_FOLDER, _NOISY_SUFFIX = "examples_noisy", "_noise"
"""Where `deskrl tasks noisy` and OSWorld keep the variants of a list beside it, and what their names add to the ids."""


@dataclass(frozen=True)
class TaskSet:
    """Tasks that are counted together. Without a `list` they are those of the configuration."""

    name: str
    list: Path | None = None
    root: Path | None = None
    suffix: str | None = None

    @property
    def queue(self) -> str:
        """Replay's queue of its episodes."""
        return f"eval/{self.name}"

    def settle_in(self, config: RunConfig, *, alone: bool) -> RunConfig:
        """An evaluation's configuration as it is for this set: its tasks, and its folder unless it is alone."""
        place: dict[str, Any] = {} if alone else {"runs": config.folder / _FOLDER, "name": self.name}
        tasks = config.tasks
        if self.list is not None:
            changes = {"list": self.list, "root": self.root, "suffix": self.suffix, "suite": None, "tasks": ()}
            tasks = tasks.model_copy(update=changes)
        return config.model_copy(update={**place, "tasks": tasks})


def choose_sets(
    lists: Sequence[Path], noisy: Sequence[Path] | None, root: Path | None = None, suffix: str | None = None
) -> list[TaskSet]:
    """The sets that a command line asks for.

    Args:
        lists: task lists to play as they are.
        noisy: lists whose noisy variants to play; an empty sequence: those of `lists`; None: of none.
        root: folder of the task files of `lists`; None: beside each.
        suffix: what the names of those files add to ids; None: found out.

    Raises:
        UserError: two sets would have one name, or an option is about a list and there is none.
    """
    if noisy is not None and not (noisy or lists):
        raise UserError("--noisy is about task lists", "name them, with --noisy or with --tasks")
    if not lists and (root is not None or suffix is not None):
        raise UserError("--root and --suffix say where the tasks of --tasks are, and there are none", "name a list")
    sets = [TaskSet(_name(path), path.resolve(), root and root.resolve(), suffix) for path in lists]
    for path in () if noisy is None else noisy or lists:
        variants = path.resolve().parent / _NOISY_FOLDER
        sets.append(TaskSet(f"{_name(path)}-noisy", path.resolve(), variants, _NOISY_SUFFIX))
    names = Counter(one.name for one in sets)
    if twice := [name for name, times in names.items() if times > 1]:
        raise UserError(f"two sets of tasks would be called {twice[0]}", "give each list a file name of its own")
    return sets or [TaskSet("tasks")]


def set_folders(root: Path) -> dict[str, Path]:
    """Folders of an evaluation's sets, by name; none where it has one set only."""
    return {path.name: path for path in sorted((root / _FOLDER).glob("*")) if path.is_dir()}


def evaluation_name(folder: Path) -> str:
    """What the folder of an evaluation, or of one of its sets, is called: `mine`, `mine/held_out`."""
    folder = folder.resolve()
    return f"{folder.parents[1].name}/{folder.name}" if folder.parent.name == _FOLDER else folder.name


def _name(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", path.stem).lstrip("._-") or "list"
