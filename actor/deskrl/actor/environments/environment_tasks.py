"""Tasks of environments: which of them a desktop that is an environment can run."""

from __future__ import annotations

from deskrl.actor.task import Task

STEP, GETTER = "environment", "environment_outcome"
"""Setup step that starts an episode, and getter of its outcome."""


def find_unmet(task: Task) -> str | None:
    """Return why an environment cannot run a task; None if it can."""
    if any(step.type != STEP for step in (*task.config, *task.evaluator.postconfig)):
        return f"an environment has no setup steps but {STEP} (tasks.noise needs real desktops)"
    if [step.type for step in task.config] != [STEP]:
        return f"its setup needs one step {STEP}"
    results = [check.result for check in task.evaluator.checks]
    if any(result is not None and result.type != GETTER for result in results):
        return f"an environment has no getters but {GETTER}"
    return None
