"""Task sets of an evaluation: a task list, its noisy variants, or the tasks of the configuration.

If there is one set, its directory is that of the evaluation. Each of several has a directory `sets/NAME` below it,
which has the layout of an evaluation.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.run_dir import RunDir

_SETS_DIR = "sets"
_NOISY_DIR, _NOISY_SUFFIX = "examples_noisy", "_noise"
"""Directory beside a list with its noisy variants, and their file name suffix, as `deskrl tasks noisy` writes them."""


@dataclass(frozen=True)
class TaskSet:
    """Tasks that are summarised together; those of the configuration if `list` is None."""

    name: str
    list: Path | None = None
    root: Path | None = None
    suffix: str | None = None

    @property
    def queue(self) -> str:
        """Name of the replay queue with its episodes."""
        return f"eval/{self.name}"

    def apply_to(self, config: RunConfig, *, is_only: bool) -> RunConfig:
        """Return the configuration of this set: its tasks, and its own directory unless it is the only set."""
        run_dir: dict[str, Any] = {} if is_only else {"runs": config.run_dir / _SETS_DIR, "name": self.name}
        tasks = config.tasks
        if self.list is not None:
            changes = {"list": self.list, "root": self.root, "suffix": self.suffix, "suite": None, "ids": ()}
            tasks = tasks.model_copy(update=changes)
        if self.root is not None and self.root.name == _NOISY_DIR:
            tasks = tasks.model_copy(update={"eval_noise": "none"})  # the variants have their noise
        return config.model_copy(update={**run_dir, "tasks": tasks})


def select_task_sets(
    lists: Sequence[Path], noisy: Sequence[Path] | None, root: Path | None = None, suffix: str | None = None
) -> list[TaskSet]:
    """Return the task sets of a command line.

    Args:
        lists: task lists.
        noisy: lists whose noisy variants are evaluated too; empty for those of `lists`, None for none.
        root: directory of the task files of `lists`; None for the directory of each list.
        suffix: suffix that the task files of `lists` add to the task ids; None to detect it.

    Raises:
        UserError: two sets have the same name, or an option needs a list and there is none.
    """
    if noisy is not None and not (noisy or lists):
        raise UserError("--noisy needs task lists", "name them with --noisy or --tasks")
    if not lists and (root is not None or suffix is not None):
        raise UserError("--root and --suffix need a task list", "name it with --tasks")
    sets = [TaskSet(_name(path), path.resolve(), root and root.resolve(), suffix) for path in lists]
    for path in () if noisy is None else noisy or lists:
        variants = path.resolve().parent / _NOISY_DIR
        sets.append(TaskSet(f"{_name(path)}-noisy", path.resolve(), variants, _NOISY_SUFFIX))
    names = Counter(one.name for one in sets)
    if repeated := [name for name, count in names.items() if count > 1]:
        raise UserError(f"two task sets have the name {repeated[0]}", "give each list a different file name")
    return sets or [TaskSet("tasks")]


def task_set_dirs(root: Path) -> dict[str, Path]:
    """Return the directories of an evaluation's task sets by name; empty if it has only one set."""
    return {path.name: path for path in sorted((root / _SETS_DIR).glob("*")) if path.is_dir()}


def is_task_set(root: Path) -> bool:
    """Return whether a directory is that of one of several task sets of an evaluation."""
    return root.resolve().parent.name == _SETS_DIR


def named_task_sets(root: Path) -> dict[str, Path]:
    """Return the directories of an evaluation's task sets by name, also if it has only one or is itself a task set."""
    if dirs := task_set_dirs(root):
        return dirs
    if is_task_set(root):
        return {root.resolve().name: root}
    try:
        names = list(json.loads((root / "evaluation.json").read_text(encoding="utf-8"))["sets"])
    except (OSError, ValueError, KeyError, TypeError):  # an evaluation of an older version
        names = []
    return {names[0] if len(names) == 1 else root.resolve().name: root}


def task_ids(set_dir: Path) -> frozenset[str]:
    """Return the ids of the evaluated tasks of a task set."""
    return frozenset(path.stem for path in RunDir(set_dir).task_results.glob("*.json"))


def evaluation_name(run_dir: Path) -> str:
    """Return the name of an evaluation, or of one of its task sets, by its directory: `mine`, `mine/held_out`."""
    run_dir = run_dir.resolve()
    return f"{run_dir.parents[1].name}/{run_dir.name}" if run_dir.parent.name == _SETS_DIR else run_dir.name


def _name(path: Path) -> str:
    """Return the name of the set of a list, restricted to the characters of a run name."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", path.stem).lstrip("._-") or "list"
