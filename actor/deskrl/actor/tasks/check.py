"""What a task list holds and what its tasks need: `deskrl tasks check`. Starts no desktop and fetches nothing.

A task whose file does not exist is missing, one whose file is malformed is invalid, and every other one is valid:
what it needs and is absent is reported and refuses nothing. The needs of a valid task are met if none of them is
known to be absent on this machine; the live web and accounts count as absent, for nothing here can tell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deskrl.actor.tasks.evaluators import is_official
from deskrl.actor.tasks.files import read_task
from deskrl.actor.tasks.lists import ListedTask, locate, read_list
from deskrl.actor.tasks.needs import Needs, absent_applications, absent_files, absent_programs, task_needs
from deskrl.core.errors import UserError


@dataclass(frozen=True)
class ValidTask:
    """A well-formed task with its needs, and which of them are not met here."""

    listed: ListedTask
    infeasible: bool
    official: bool
    """Whether the installed official evaluators judge it."""
    needs: Needs
    absent_applications: tuple[str, ...]
    absent_programs: tuple[str, ...]
    absent_files: tuple[str, ...]

    @property
    def unjudged(self) -> bool:
        """Whether its evaluator is neither built in nor installed."""
        return bool(self.needs.getters or self.needs.metrics) and not self.official

    @property
    def met(self) -> bool:
        """Whether nothing that it needs is known to be absent."""
        needs = self.needs
        unknown = needs.setup_steps or self.unjudged
        absent = self.absent_applications or self.absent_programs or self.absent_files
        return not (needs.network or needs.accounts or unknown or absent)


@dataclass(frozen=True)
class InvalidTask:
    """A task whose file is malformed: what is wrong, and the mend."""

    listed: ListedTask
    error: UserError


@dataclass(frozen=True)
class ListReport:
    """A checked list. Each of its tasks is in one of the three tuples, in the list's order."""

    path: Path
    valid: tuple[ValidTask, ...]
    invalid: tuple[InvalidTask, ...]
    missing: tuple[ListedTask, ...]

    @property
    def num_tasks(self) -> int:
        """How many tasks the list names."""
        return len(self.valid) + len(self.invalid) + len(self.missing)

    @property
    def applications(self) -> list[str]:
        """The list's applications, in alphabetical order."""
        valid = {task.listed.application for task in self.valid}
        invalid = {task.listed.application for task in self.invalid}
        return sorted(valid | invalid | {task.application for task in self.missing})

    def of(self, application: str) -> ListReport:
        """The part of one application."""
        return ListReport(
            self.path,
            tuple(task for task in self.valid if task.listed.application == application),
            tuple(task for task in self.invalid if task.listed.application == application),
            tuple(task for task in self.missing if task.application == application),
        )

    def counts(self) -> dict[str, int]:
        """How many tasks there are of each kind and with each need; a task counts under every need that it has."""
        valid = {name: sum(map(holds, self.valid)) for name, holds in _KINDS.items()}
        found = {"tasks": self.num_tasks, "missing": len(self.missing), "invalid": len(self.invalid)}
        return found | {"valid": len(self.valid)} | valid


_KINDS: dict[str, Callable[[ValidTask], bool]] = {
    "met": lambda task: task.met,
    "infeasible": lambda task: task.infeasible,
    "absent_applications": lambda task: bool(task.absent_applications),
    "absent_programs": lambda task: bool(task.absent_programs),
    "network": lambda task: bool(task.needs.network),
    "accounts": lambda task: bool(task.needs.accounts),
    "absent_files": lambda task: bool(task.absent_files),
    "setup_steps": lambda task: bool(task.needs.setup_steps),
    "evaluators": lambda task: task.unjudged,
}


def check_list(path: Path, root: Path | None = None, suffix: str | None = None) -> ListReport:
    """Read a list and every task file of it; `root` and `suffix` are as in `lists.locate`.

    Raises:
        UserError: the list itself is malformed, or there is no folder of task files.
    """
    valid: list[ValidTask] = []
    invalid: list[InvalidTask] = []
    missing: list[ListedTask] = []
    for listed in locate(path, read_list(path), root, suffix):
        if not listed.file.is_file():
            missing.append(listed)
            continue
        try:
            valid.append(_check_task(listed))
        except UserError as error:
            invalid.append(InvalidTask(listed, error))
    return ListReport(path, tuple(valid), tuple(invalid), tuple(missing))


def _check_task(listed: ListedTask) -> ValidTask:
    task = read_task(listed.file)
    try:
        needs = task_needs(task)
        files = absent_files(task, needs)
    except ValueError as error:  # an address that is none
        raise UserError(f"{listed.file}: {error}", "mend the task file") from error
    applications, programs = absent_applications(needs), absent_programs(needs)
    return ValidTask(listed, task.evaluator.infeasible, is_official(task), needs, applications, programs, files)


def as_json(report: ListReport) -> dict[str, Any]:
    """The report as a JSON document, every task with all that it needs."""
    return {
        "list": str(report.path),
        "counts": report.counts(),
        "applications": {name: report.of(name).counts() for name in report.applications},
        "missing": [_listed_json(task) for task in report.missing],
        "invalid": [_listed_json(task.listed) | {"error": str(task.error)} for task in report.invalid],
        "valid": [_task_json(task) for task in report.valid],
    }


def _listed_json(listed: ListedTask) -> dict[str, Any]:
    return {"application": listed.application, "id": listed.id, "file": str(listed.file)}


def _task_json(task: ValidTask) -> dict[str, Any]:
    return _listed_json(task.listed) | {
        "met": task.met,
        "infeasible": task.infeasible,
        "official": task.official,
        "needs": asdict(task.needs),
        "absent_applications": task.absent_applications,
        "absent_programs": task.absent_programs,
        "absent_files": task.absent_files,
    }
