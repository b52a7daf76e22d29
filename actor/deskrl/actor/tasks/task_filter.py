"""Task filter: selects the tasks whose requirements are met by the desktops of a run.

Applications and programs can be looked up only for desktops on this machine. Other desktops are assumed to have them
and to have network access.
"""

from __future__ import annotations

from collections.abc import Sequence

from deskrl.actor.desktops.provider import DesktopProvider
from deskrl.actor.desktops.provider_registry import select_provider
from deskrl.actor.task import Task
from deskrl.actor.tasks.requirements import (
    missing_applications,
    missing_capabilities,
    missing_programs,
    task_requirements,
    unsupported_reasons,
)
from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError

_SKIP_HINT = "set tasks.unmet_requirements to skip or to run such tasks"
_HINT = (
    "possibly download files with `deskrl tasks fetch`, or install the applications of deskrl's own tasks with "
    f"deploy/install.sh suite; or {_SKIP_HINT} (`deskrl tasks check` lists the requirements of each task)"
)
_PROVIDER_HINT = f"choose other tasks, or {_SKIP_HINT}"


def filter_tasks(tasks: Sequence[Task], config: RunConfig) -> tuple[list[Task], dict[str, list[str]]]:
    """Apply the setting `tasks.unmet_requirements` to the tasks of a run.

    Returns:
        The tasks to run, and the reasons why the other tasks are left out, by task id.

    Raises:
        UserError: requirements are not met and `tasks.unmet_requirements` is "reject", or no task remains.
    """
    if config.tasks.unmet_requirements == "run":
        return list(tasks), {}
    provider = select_provider(config.desktop).provider
    left_out = {task.id: reasons for task in tasks if (reasons := unmet_requirements(task, provider))}
    runnable = [task for task in tasks if task.id not in left_out]
    if left_out and (not runnable or config.tasks.unmet_requirements == "reject"):
        name, reasons = next(iter(left_out.items()))
        hint = _PROVIDER_HINT if any(provider.find_unmet(task) for task in tasks) else _HINT
        message = f"the requirements of {len(left_out)} of {len(tasks)} tasks are not met: {name}: {'; '.join(reasons)}"
        raise UserError(message + (", …" if len(left_out) > 1 else ""), hint)
    return runnable, left_out


def unmet_requirements(task: Task, provider: DesktopProvider) -> list[str]:
    """Return the requirements of a task that are not met, one line each; empty if all are met.

    Args:
        task: task to examine.
        provider: provider of the desktops.
    """
    if reason := provider.find_unmet(task):
        return [reason]
    required = task_requirements(task)
    reasons = unsupported_reasons(task, required)
    if provider.runs_machine_programs:
        reasons += [f"application {name} is not installed" for name in missing_applications(required)]
        reasons += [f"program {name} is not installed" for name in missing_programs(required)]
        reasons += [f"the desktop has no {name}" for name in missing_capabilities(required)]
        reasons += [f"network required: {reason}" for reason in required.network]
    return reasons + [f"account required: {name}" for name in required.accounts]
