"""Which tasks a run can play on its desktops, and what it does about the others. Starts no desktop and fetches nothing.

What a desktop on this machine has can be looked up; what one elsewhere has (applications, programs, the live web)
cannot, and is taken to be there.
"""

from __future__ import annotations

from collections.abc import Sequence

from deskrl.actor.desktops import simulated
from deskrl.actor.tasks.files import Task
from deskrl.actor.tasks.needs import absent_applications, absent_programs, task_needs, unsupported
from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError

_OF_THIS_MACHINE = {"embedded"}
"""Providers whose desktops see this machine's programs, and no network."""

_MEND = (
    "get files with deskrl tasks fetch, and applications with deploy/install.sh suite (deskrl's own tasks), or choose "
    "with tasks.unplayable: skip such tasks or play them all the same (deskrl tasks check tells what each needs)"
)


def split_playable(tasks: Sequence[Task], config: RunConfig) -> tuple[list[Task], dict[str, list[str]]]:
    """The tasks that a run plays, and why it leaves the others out: reasons by task id.

    Raises:
        UserError: one cannot be played and the configuration does not say what to do about it; or none can.
    """
    if config.tasks.unplayable == "play":
        return list(tasks), {}
    left_out = {task.id: reasons for task in tasks if (reasons := _reasons(task, config.desktop.provider))}
    playable = [task for task in tasks if task.id not in left_out]
    if left_out and (not playable or config.tasks.unplayable == "refuse"):
        name, reasons = next(iter(left_out.items()))
        told = f"{len(left_out)} of {len(tasks)} tasks cannot be played here: {name}: {'; '.join(reasons)}"
        raise UserError(told + (", …" if len(left_out) > 1 else ""), _MEND)
    return playable, left_out


def _reasons(task: Task, provider: str) -> list[str]:
    if provider == "simulated":
        return [] if simulated.judges(task) else ["a simulated desktop cannot judge it"]
    return unplayable(task, here=provider in _OF_THIS_MACHINE)


def unplayable(task: Task, *, here: bool) -> list[str]:
    """Why a task cannot be played on a desktop of this machine (`here`) or of another one; empty if it can."""
    needs = task_needs(task)
    reasons = unsupported(task, needs)
    if here:
        reasons += [f"the application {name} is absent" for name in absent_applications(needs)]
        reasons += [f"the program {name} is absent" for name in absent_programs(needs)]
        reasons += [f"no network: {why}" for why in needs.network]
    return reasons + [f"needs an account: {name}" for name in needs.accounts]
