"""Registry of task samplers: which task each group of the training queue plays.

A sampler is a function `sampler(inputs, options)` that returns a task id. It may depend on its arguments only: neither
on the time, nor on earlier calls, nor on the order of a set, which differs between processes. The replay service keeps
the first plan of each group, so a resumed run plays the groups that were planned before it stopped, and continues with
the same function. Runs with the same seed have the same plan if the sampler does not read the success rates: groups are
planned ahead, so how many updates the rates include depends on the speed of the actors.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from deskrl.core import ids
from deskrl.core.config import TasksConfig
from deskrl.core.errors import UserError
from deskrl.core.registry import Extension, Registry, missing_arguments


@dataclass(frozen=True)
class SamplerInputs:
    """What the choice of a task may depend on."""

    ordinal: int
    """Index of the group in the training queue, from 0."""
    seed: int
    """Seed of the run."""
    task_ids: tuple[str, ...]
    """Ids of all tasks, in the order of the task list; at least one."""
    success_rates: Mapping[str, float]
    """Success rate of each task in the last update that had episodes of it; tasks without episodes are missing."""


TaskSampler = Callable[[SamplerInputs, Any], str]
"""Function of the inputs and an instance of its own `Options` or None."""

TASK_SAMPLERS: Registry[TaskSampler] = Registry(
    "task sampler",
    "tasks.sampler",
    "deskrl.task_samplers",
    lambda found: missing_arguments(found, "inputs", "options"),
)


def select_task_sampler(config: TasksConfig) -> Extension[TaskSampler]:
    """Return the configured task sampler with its options; raises UserError if it cannot be selected."""
    return TASK_SAMPLERS.select(config.sampler, config.sampler_options)


def sample_task(sampler: Extension[TaskSampler], inputs: SamplerInputs) -> str:
    """Return the id of the task that a group plays.

    Raises:
        UserError: the sampler did not return the id of one of the tasks.
    """
    task_id = sampler.implementation(inputs, sampler.options)
    if task_id not in inputs.task_ids:
        raise UserError(
            f"{TASK_SAMPLERS.key}: {sampler.name} returned {task_id!r} for group {inputs.ordinal}, which is not the id "
            f"of one of the {len(inputs.task_ids)} tasks",
            "return one of inputs.task_ids, or set tasks.sampler to epochs",
        )
    return task_id


@TASK_SAMPLERS.register("epochs")
def epochs(inputs: SamplerInputs, options: None = None) -> str:
    """Return the task of a group if each epoch is one pass over the task list, in a random order of its own."""
    epoch, position = divmod(inputs.ordinal, len(inputs.task_ids))
    order = list(inputs.task_ids)
    random.Random(ids.derive_seed(inputs.seed, "epoch", epoch)).shuffle(order)
    return order[position]
