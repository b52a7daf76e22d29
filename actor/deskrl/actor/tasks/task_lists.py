"""Task lists in OSWorld's format {application: [id, ...]}: read lists, locate task files, choose balanced subsets.

The task files of a list are `<application>/<id><suffix>.json` below a root directory, by default `examples/` next to
the list. A task bundle `<application>/<id>/` can stand in place of a file. Noisy variants have the ids of the original
tasks, another root and a suffix (`_noise`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path

from deskrl.actor.task import Task
from deskrl.actor.tasks.task_bundles import SETTINGS_FILE, is_bundle
from deskrl.actor.tasks.task_schema import OWN_SUITE, choose_files, read_task
from deskrl.core.config import TasksConfig
from deskrl.core.errors import UserError
from deskrl.core.file_io import read_json_object
from deskrl.core.ids import derive_seed

_MAX_NAME_CHARACTERS = 200

TaskList = Mapping[str, Sequence[str]]
"""Task ids by application; applications and ids are in the order of the file."""


@dataclass(frozen=True)
class ListedTask:
    """Entry of a task list with the expected path of its task file, which may not exist."""

    application: str
    id: str
    file: Path


def read_list(path: Path) -> TaskList:
    """Read and validate a task list.

    Raises:
        UserError: the file cannot be read, is not a map from applications to task ids, or contains an id twice.
    """
    hint = 'give a task list of the form {"os": ["<id>", ...], ...}'
    listed = read_json_object(path, hint)
    for application, ids in listed.items():
        if not isinstance(ids, list) or not all(isinstance(name, str) for name in ids):
            raise UserError(f"{path}: {application}: must be an array of task ids", hint)
        if invalid := [name for name in (application, *ids) if not _is_valid_name(name)]:
            raise UserError(f"{path}: {application}: {invalid[0]!r} cannot be the name of a file", hint)
        if duplicates := [name for number, name in enumerate(ids) if name in ids[:number]]:
            raise UserError(f"{path}: {application}: duplicate task id {duplicates[0]}", "list each task once")
    if not any(listed.values()):
        raise UserError(f"{path}: the list is empty", hint)
    return listed


def locate_tasks(path: Path, listed: TaskList, root: Path | None = None, suffix: str | None = None) -> list[ListedTask]:
    """Return the tasks of a list with the paths of their files; the files need not exist.

    Args:
        path: path of the list.
        listed: content of the list.
        root: directory with `<application>/<id><suffix>.json`, or with an `examples/` that has this layout; None:
            `examples/` next to the list.
        suffix: suffix of file names after the id; None: detect it. A detected suffix is one that all candidate files
            have in common while no file without a suffix exists; otherwise it is empty.

    Raises:
        UserError: the directory of the task files does not exist.
    """
    directory = _examples_dir(path, root)
    if suffix is None:
        suffix = _detect_suffix(directory, listed)
    return [
        ListedTask(application, name, _task_file(directory / application, name, suffix))
        for application, ids in listed.items()
        for name in ids
    ]


def _task_file(folder: Path, name: str, suffix: str) -> Path:
    """Return the expected path of a task file; that of a bundle's settings if there is a bundle and no task file."""
    file = folder / f"{name}{suffix}.json"
    return folder / name / SETTINGS_FILE if is_bundle(folder / name) and not file.is_file() else file


def load_list(path: Path, root: Path | None = None, suffix: str | None = None) -> list[Task]:
    """Load the tasks of a list, in its order; `root` and `suffix` are as in `locate_tasks`.

    Raises:
        UserError: the list or a task file is invalid, or task files do not exist (the message names all of them).
    """
    return [read_task(file) for file in _listed_files(path, root, suffix)]


def _listed_files(path: Path, root: Path | None, suffix: str | None) -> list[Path]:
    located = locate_tasks(path, read_list(path), root, suffix)
    if missing := [listed for listed in located if not listed.file.is_file()]:
        names = ", ".join(f"{listed.application}/{listed.id}" for listed in missing)
        raise UserError(
            f"{path}: {len(missing)} of {len(located)} tasks do not exist: {names} ({missing[0].file}: not found)",
            "remove them from the list, or give the directory of the task files (root)",
        )
    return [listed.file for listed in located]


def task_source_files(source: TasksConfig, default_suite: Path | None = None) -> list[Path]:
    """Return the task files of a configuration, and task.toml of its bundles, in order.

    Args:
        source: section `tasks` of the run configuration.
        default_suite: suite if the section names neither a suite nor a list; None: deskrl's own.

    Raises:
        UserError: the list is invalid, a task does not exist (the message names all of them), or there are none.
    """
    if source.list is not None:
        return _listed_files(source.list, source.root, source.suffix)
    return choose_files(source.suite or default_suite or OWN_SUITE, source.ids)


def named_source(
    source: TasksConfig, suite: Path | None, ids: Sequence[str], list_path: Path | None, root: Path | None
) -> TasksConfig:
    """Return the section `tasks` of a configuration with the tasks that a command names in place of its own."""
    names = {"suite": suite, "ids": tuple(ids), "list": list_path, "root": root, "suffix": None}
    return source.model_copy(update=names)


def write_list(path: Path, listed: TaskList) -> None:
    """Write a task list; raises OSError if the file cannot be written."""
    path.write_text(json.dumps(listed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def balanced_subset(listed: TaskList, num_tasks: int, seed: int = 0) -> dict[str, list[str]]:
    """Choose a random subset of a list with the numbers of tasks per application as equal as possible.

    The choice depends only on the seed and the ids. With the same seed, a smaller subset is contained in every larger
    one. Applications and ids keep their order.

    Args:
        listed: task list to choose from.
        num_tasks: number of tasks to choose.
        seed: seed of the choice.

    Raises:
        UserError: `num_tasks` is less than 1 or more than the list has.
    """
    total = sum(map(len, listed.values()))
    if not 1 <= num_tasks <= total:
        raise UserError(f"cannot choose {num_tasks} of {total} tasks", f"choose 1 to {total}")
    shuffled = {
        application: sorted(ids, key=lambda name: derive_seed("subset", seed, name))
        for application, ids in listed.items()
    }
    order = sorted(listed, key=lambda application: derive_seed("subset", seed, "turn", application))
    round_robin = [
        (application, shuffled[application][number])
        for number in range(max(map(len, listed.values())))
        for application in order
        if number < len(shuffled[application])
    ]
    chosen = set(round_robin[:num_tasks])
    subset = {
        application: [name for name in ids if (application, name) in chosen] for application, ids in listed.items()
    }
    return {application: ids for application, ids in subset.items() if ids}


def _is_valid_name(name: str) -> bool:
    """Return whether a name, with a suffix added, can be the name of a file or directory."""
    return name not in ("", ".", "..") and "/" not in name and name.isprintable() and len(name) < _MAX_NAME_CHARACTERS


def _examples_dir(path: Path, root: Path | None) -> Path:
    """Return the directory that has one subdirectory of task files for each application."""
    directory = (path.parent if root is None else root) / "examples"
    if root is not None and not directory.is_dir():
        directory = root
    if not directory.is_dir():
        raise UserError(f"{directory}: not a directory", "give the root of the task files")
    return directory


def _detect_suffix(directory: Path, listed: TaskList) -> str:
    names = [(directory / application, name) for application, ids in listed.items() for name in ids]
    if any((folder / f"{name}.json").is_file() for folder, name in names):
        return ""
    found = {file.stem.removeprefix(name) for folder, name in names for file in folder.glob(f"{escape(name)}_*.json")}
    return found.pop() if len(found) == 1 else ""
