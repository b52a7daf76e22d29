"""Report on a task list: validity of the task files and requirements of the tasks (`deskrl tasks check`).

A task is missing if its file does not exist, invalid if its file is malformed, and valid otherwise. Unmet requirements
do not make a task invalid. The requirements of a task count as met if everything was found on this machine. Network
and accounts cannot be verified and count as unmet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deskrl.actor.tasks.evaluators import has_osworld_evaluator
from deskrl.actor.tasks.requirements import (
    Requirements,
    missing_applications,
    missing_capabilities,
    missing_files,
    missing_local_files,
    missing_programs,
    task_requirements,
)
from deskrl.actor.tasks.task_bundles import SETTINGS_FILE
from deskrl.actor.tasks.task_lists import ListedTask, locate_tasks, read_list
from deskrl.actor.tasks.task_schema import read_task, suite_files
from deskrl.core.errors import UserError


@dataclass(frozen=True)
class ValidTask:
    """Task with a valid file: its requirements, and which of them are unmet on this machine."""

    listed: ListedTask
    infeasible: bool
    """Whether the correct answer is that the task is infeasible."""
    osworld_evaluator: bool
    """Whether the installed OSWorld evaluators can evaluate the task."""
    requirements: Requirements
    missing_applications: tuple[str, ...]
    missing_programs: tuple[str, ...]
    missing_files: tuple[str, ...]
    missing_local_files: tuple[str, ...]
    missing_capabilities: tuple[str, ...]

    @property
    def is_evaluator_missing(self) -> bool:
        """Whether the evaluator is neither built in nor installed."""
        return bool(self.requirements.getters or self.requirements.metrics) and not self.osworld_evaluator

    @property
    def are_requirements_met(self) -> bool:
        """Whether everything that the task requires was found."""
        required = self.requirements
        unsupported = required.setup_steps or self.is_evaluator_missing
        missing_programs = self.missing_applications or self.missing_programs or self.missing_capabilities
        missing_files = self.missing_files or self.missing_local_files
        return not (required.network or required.accounts or unsupported or missing_programs or missing_files)


@dataclass(frozen=True)
class InvalidTask:
    """Task with a malformed file, and the error."""

    listed: ListedTask
    error: UserError


@dataclass(frozen=True)
class ListReport:
    """Checked task list. Each task is in exactly one of the three tuples, in the order of the list."""

    path: Path
    valid: tuple[ValidTask, ...]
    invalid: tuple[InvalidTask, ...]
    missing: tuple[ListedTask, ...]

    @property
    def num_tasks(self) -> int:
        """Number of tasks on the list."""
        return len(self.valid) + len(self.invalid) + len(self.missing)

    @property
    def applications(self) -> list[str]:
        """Applications of the list in alphabetical order."""
        valid = {task.listed.application for task in self.valid}
        invalid = {task.listed.application for task in self.invalid}
        return sorted(valid | invalid | {task.application for task in self.missing})

    def for_application(self, application: str) -> ListReport:
        """Return the part of the report about one application."""
        return ListReport(
            self.path,
            tuple(task for task in self.valid if task.listed.application == application),
            tuple(task for task in self.invalid if task.listed.application == application),
            tuple(task for task in self.missing if task.application == application),
        )

    def counts(self) -> dict[str, int]:
        """Return the number of tasks by validity and by requirement; a task counts under each of its requirements."""
        valid = {name: sum(map(applies, self.valid)) for name, applies in _CATEGORIES.items()}
        tasks = {"tasks": self.num_tasks, "missing": len(self.missing), "invalid": len(self.invalid)}
        return tasks | {"valid": len(self.valid)} | valid


_CATEGORIES: dict[str, Callable[[ValidTask], bool]] = {
    "met": lambda task: task.are_requirements_met,
    "infeasible": lambda task: task.infeasible,
    "missing_applications": lambda task: bool(task.missing_applications),
    "missing_programs": lambda task: bool(task.missing_programs),
    "network": lambda task: bool(task.requirements.network),
    "accounts": lambda task: bool(task.requirements.accounts),
    "missing_files": lambda task: bool(task.missing_files),
    "missing_local_files": lambda task: bool(task.missing_local_files),
    "missing_capabilities": lambda task: bool(task.missing_capabilities),
    "setup_steps": lambda task: bool(task.requirements.setup_steps),
    "evaluators": lambda task: task.is_evaluator_missing,
}


def check_list(path: Path, root: Path | None = None, suffix: str | None = None) -> ListReport:
    """Read a task list, or a suite of task files and bundles, and all its tasks.

    Args:
        path: task list, or root of a suite as in `suite_files`.
        root: as in `locate_tasks`, for lists only.
        suffix: as in `locate_tasks`, for lists only.

    Raises:
        UserError: the list itself is malformed, or the directory of the task files does not exist or has none.
    """
    valid: list[ValidTask] = []
    invalid: list[InvalidTask] = []
    missing: list[ListedTask] = []
    for listed in _suite_tasks(path) if path.is_dir() else locate_tasks(path, read_list(path), root, suffix):
        if not listed.file.is_file():
            missing.append(listed)
            continue
        try:
            valid.append(_check_task(listed))
        except UserError as error:
            invalid.append(InvalidTask(listed, error))
    return ListReport(path, tuple(valid), tuple(invalid), tuple(missing))


def _suite_tasks(suite: Path) -> list[ListedTask]:
    """Return the tasks of a suite; their application is the name of the folder that contains the file or bundle."""
    return [
        ListedTask(file.parent.parent.name if file.name == SETTINGS_FILE else file.parent.name, name, file)
        for name, file in suite_files(suite).items()
    ]


def _check_task(listed: ListedTask) -> ValidTask:
    task = read_task(listed.file)
    try:
        required = task_requirements(task)
    except UserError as error:
        raise UserError(f"{listed.file}: {error.message}", error.hint) from error
    return ValidTask(
        listed=listed,
        infeasible=task.evaluator.is_infeasible,
        osworld_evaluator=has_osworld_evaluator(task),
        requirements=required,
        missing_applications=missing_applications(required),
        missing_programs=missing_programs(required),
        missing_files=missing_files(task, required),
        missing_local_files=missing_local_files(required),
        missing_capabilities=missing_capabilities(required),
    )


def as_json(report: ListReport) -> dict[str, Any]:
    """Return the report as a JSON document with all requirements of each task."""
    return {
        "list": str(report.path),
        "counts": report.counts(),
        "applications": {name: report.for_application(name).counts() for name in report.applications},
        "missing": [_listed_json(task) for task in report.missing],
        "invalid": [_listed_json(task.listed) | {"error": str(task.error)} for task in report.invalid],
        "valid": [_task_json(task) for task in report.valid],
    }


def _listed_json(listed: ListedTask) -> dict[str, Any]:
    return {"application": listed.application, "id": listed.id, "file": str(listed.file)}


def _task_json(task: ValidTask) -> dict[str, Any]:
    return _listed_json(task.listed) | {
        "met": task.are_requirements_met,
        "infeasible": task.infeasible,
        "osworld_evaluator": task.osworld_evaluator,
        "requirements": asdict(task.requirements),
        "missing_applications": task.missing_applications,
        "missing_programs": task.missing_programs,
        "missing_files": task.missing_files,
        "missing_local_files": task.missing_local_files,
        "missing_capabilities": task.missing_capabilities,
    }
