"""Choice of one task by its id or by the path of its file."""

from __future__ import annotations

from pathlib import Path

from deskrl.actor.desktops.provider_registry import select_provider
from deskrl.actor.task import Task
from deskrl.actor.tasks.noise import with_noise
from deskrl.actor.tasks.task_bundles import SETTINGS_FILE, is_bundle
from deskrl.actor.tasks.task_filter import filter_tasks
from deskrl.actor.tasks.task_lists import locate_tasks, named_source, read_list
from deskrl.actor.tasks.task_schema import OWN_SUITE, choose_files, read_task
from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError


def select_task(config: RunConfig, name: str) -> tuple[Task, RunConfig]:
    """Return a task, and the configuration with this task in place of its others as far as it can name it.

    Args:
        config: configuration whose tasks are searched.
        name: path of a task file or of a task bundle, or id of a task of the configured list or suite.

    Raises:
        UserError: there is no such task, or it is invalid, or its requirements are not met on this machine.
    """
    path = Path(name)
    if is_bundle(path):
        source = named_source(config.tasks, path, (), None, None)
        task = read_task(path / SETTINGS_FILE)
    elif path.is_file():
        source = config.tasks
        task = read_task(path)
    elif config.tasks.list is not None:
        source = config.tasks
        task = read_task(_listed_file(config, config.tasks.list, name))
    else:
        suite = config.tasks.suite or select_provider(config.desktop).provider.task_suite or OWN_SUITE
        source = named_source(config.tasks, suite, (name,), None, None)
        task = read_task(choose_files(suite, (name,))[0])
    config = config.model_copy(update={"tasks": source})
    task = with_noise(task, config.tasks.noise, config.seed)
    filter_tasks([task], config)
    return task, config


def _listed_file(config: RunConfig, path: Path, name: str) -> Path:
    located = locate_tasks(path, read_list(path), config.tasks.root, config.tasks.suffix)
    for listed in located:
        if listed.id == name:
            return listed.file
    raise UserError(f"{path}: no task {name}", f"give one of its {len(located)} task ids, or the path of a task file")
