"""Task lists in OSWorld's format, {application: [id, …]}: read, found as files, balanced. Knows no task's inside.

The files of a list lie in a folder of their own, `<application>/<id><suffix>.json`: `examples/` beside the list unless
another is named. Noisy variants have the ids of the plain tasks, a folder of their own and a suffix (`_noise`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path

from deskrl.actor.tasks.files import Task, read_task
from deskrl.core.errors import UserError
from deskrl.core.ids import derive_seed

_NAME_CHARACTERS = 200

TaskList = Mapping[str, Sequence[str]]
"""Task ids by application, both in the order of the file."""


@dataclass(frozen=True)
class ListedTask:
    """A task as a list names it, and the file in which it should be."""

    application: str
    id: str
    file: Path


def read_list(path: Path) -> TaskList:
    """The list in a file.

    Raises:
        UserError: it cannot be read, is no such map, or names a task twice.
    """
    try:
        listed = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}", "name a task list") from error
    except ValueError as error:
        raise UserError(f"{path}: is no JSON: {error}", "mend the task list") from error
    mend = 'write it as {"os": ["<id>", …], …}'
    if not isinstance(listed, dict):
        raise UserError(f"{path}: is no map from application to task ids", mend)
    for application, ids in listed.items():
        if not isinstance(ids, list) or not all(isinstance(name, str) for name in ids):
            raise UserError(f"{path}: {application}: is no list of task ids", mend)
        if strange := [name for name in (application, *ids) if not _is_name(name)]:
            raise UserError(f"{path}: {application}: {strange[0]!r} is no name", mend)
        if twice := [name for number, name in enumerate(ids) if name in ids[:number]]:
            raise UserError(f"{path}: {application}: names {twice[0]} twice", "name each task once")
    if not any(listed.values()):
        raise UserError(f"{path}: names no task", mend)
    return listed


def locate(path: Path, listed: TaskList, root: Path | None = None, suffix: str | None = None) -> list[ListedTask]:
    """The tasks of a list with their files, whether these exist or not.

    Args:
        path: where the list was read.
        listed: what it names.
        root: folder with `<application>/<id><suffix>.json`, or with an `examples/` of these; None: beside the list.
        suffix: what file names add to ids; None: nothing, or what all of the root's files add where none has a plain
            name.
    """
    folder = _examples(path.parent if root is None else root, named=root is not None)
    added = _find_suffix(folder, listed) if suffix is None else suffix
    return [
        ListedTask(application, name, folder / application / f"{name}{added}.json")
        for application, ids in listed.items()
        for name in ids
    ]


def load_list(path: Path, root: Path | None = None, suffix: str | None = None) -> list[Task]:
    """Tasks of a list file, in its order; `root` and `suffix` are as in `locate`.

    Raises:
        UserError: a list or a task file that is invalid, or ids without a file, each of which is named.
    """
    located = locate(path, read_list(path), root, suffix)
    if missing := [listed for listed in located if not listed.file.is_file()]:
        names = ", ".join(f"{listed.application}/{listed.id}" for listed in missing)
        raise UserError(
            f"{path}: {len(missing)} of {len(located)} tasks do not exist: {names} (there is no {missing[0].file})",
            "take them off the list, or name the folder of the task files",
        )
    return [read_task(listed.file) for listed in located]


def balance(listed: TaskList, num_tasks: int, seed: int = 0) -> dict[str, list[str]]:
    """A subset with as even a number of tasks from each application as there are tasks for.

    What is drawn follows from the seed and the ids alone, and a smaller subset is part of a larger one. Applications
    and ids keep their order.

    Raises:
        UserError: fewer than one task asked for, or more than there are.
    """
    total = sum(map(len, listed.values()))
    if not 1 <= num_tasks <= total:
        raise UserError(f"cannot take {num_tasks} of {total} tasks", f"ask for 1 to {total}")
    drawn = {
        application: sorted(ids, key=lambda name: derive_seed("subset", seed, name))
        for application, ids in listed.items()
    }
    turns = sorted(listed, key=lambda application: derive_seed("subset", seed, "turn", application))
    rounds = [
        (application, drawn[application][number])
        for number in range(max(map(len, listed.values())))
        for application in turns
        if number < len(drawn[application])
    ]
    chosen = set(rounds[:num_tasks])
    subset = {
        application: [name for name in ids if (application, name) in chosen] for application, ids in listed.items()
    }
    return {application: ids for application, ids in subset.items() if ids}


def _is_name(name: str) -> bool:
    """Whether it can be the name of a file or folder, with a suffix."""
    return name not in ("", ".", "..") and "/" not in name and name.isprintable() and len(name) < _NAME_CHARACTERS


def _examples(folder: Path, named: bool) -> Path:
    """The folder with a folder of task files for each application."""
    examples = folder / "examples"
    if not named or examples.is_dir():
        folder = examples
    if not folder.is_dir():
        raise UserError(f"{folder}: is no folder", "name the root of the task files")
    return folder


def _find_suffix(folder: Path, listed: TaskList) -> str:
    names = [(folder / application, name) for application, ids in listed.items() for name in ids]
    if any((place / f"{name}.json").is_file() for place, name in names):
        return ""
    added = {file.stem.removeprefix(name) for place, name in names for file in place.glob(f"{escape(name)}_*.json")}
    return added.pop() if len(added) == 1 else ""
