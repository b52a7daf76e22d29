"""Task files of the run directory: the selected tasks, their applications and the tokenizer corpus.

`tasks.json` maps task ids to task files, `applications.json` maps task ids to applications. `corpus.txt` contains the
texts that the policy reads and writes in these tasks, separated by form feeds; the tokenizer of the tiny model is
trained on it. `built_model.json` contains the architecture of the tiny model and its largest number. `left_out.json`
lists the tasks that the run leaves out with reasons, if there are any. `demonstrations/` contains the demonstrations of
a warm start that imitates a folder (see `core.imitation_data`).
"""

from __future__ import annotations

import json
from collections import Counter

from PIL import Image

from deskrl.actor.agent.action_language import PolicyResponse
from deskrl.actor.agent.conversation import Agent
from deskrl.actor.agent.language_registry import select_language
from deskrl.actor.agent.model_fit import built_architecture
from deskrl.actor.demonstration_rendering import render_demonstrations
from deskrl.actor.desktops.provider_registry import select_provider
from deskrl.actor.task import Task
from deskrl.actor.tasks.noise import highest_level, with_noise
from deskrl.actor.tasks.task_filter import filter_tasks
from deskrl.actor.tasks.task_lists import task_source_files
from deskrl.actor.tasks.task_schema import read_task
from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.file_io import write_json
from deskrl.core.run_dir import RunDir

_NUM_REPEATS = 8
"""Repetitions of each text in the corpus, so that the tokenizer merges the words of tasks before other strings."""


def load(config: RunConfig) -> tuple[list[Task], dict[str, list[str]]]:
    """Load the tasks of a run.

    Returns:
        The tasks to run, and the reasons why other tasks are left out, by task id.

    Raises:
        UserError: a task is unknown or invalid, a task id is not unique, requirements of tasks are not met, or a task
            has no scripted solution although the run has a warm start.
    """
    source = config.tasks
    tasks = list(map(read_task, task_source_files(source, select_provider(config.desktop).provider.task_suite)))
    if duplicates := [name for name, num in Counter(task.id for task in tasks).items() if num > 1]:
        raise UserError(f"duplicate task ids: {', '.join(duplicates)}", "give each task a unique id")
    # A variant at a level requires what all lower levels do, and the task itself.
    variants, left_out = filter_tasks([with_noise(task, highest_level(source), config.seed) for task in tasks], config)
    kept = {variant.id for variant in variants}
    runnable = [task for task in tasks if task.id in kept]
    unsolved = [task.id for task in runnable if not task.solution]
    warm_start = config.learner.warm_start
    if warm_start is not None and warm_start.demonstrations is None and unsolved:
        raise UserError(
            f"learner.warm_start imitates scripted solutions, but {len(unsolved)} of {len(runnable)} tasks have none: "
            + ", ".join(unsolved[:3])
            + (", …" if len(unsolved) > 3 else ""),
            "unset learner.warm_start, set learner.warm_start.demonstrations, or choose other tasks",
        )
    return runnable, left_out


def count(config: RunConfig) -> int:
    """Return the number of tasks of a run.

    Unmet requirements are not an error here, because the desktops may be on another machine.

    Raises:
        UserError: a task is unknown or invalid, or a task id is not unique.
    """
    if config.tasks.unmet_requirements == "reject":
        config = config.model_copy(update={"tasks": config.tasks.model_copy(update={"unmet_requirements": "run"})})
    return len(load(config)[0])


def main(config: RunConfig) -> None:
    """Write the task files to the run directory; raises UserError as `load` does."""
    run_dir = RunDir(config.run_dir)
    tasks, left_out = load(config)
    if left_out:
        total = len(tasks) + len(left_out)
        path = run_dir.left_out
        print(f"running {len(tasks)} of {total} tasks; {path} lists the others with reasons", flush=True)
        write_json(path, left_out)
    run_dir.write_tasks(
        tasks={task.id: json.loads(task.data) for task in tasks},
        applications={task.id: task.domain for task in tasks},
        corpus=[text for task in tasks for text in _texts(task, config)],
    )
    if config.model.build is not None:
        coordinate_range = select_language(config.agent).coordinate_range(*config.image_size)
        run_dir.write_built_model(built_architecture(config), max(coordinate_range))
    warm_start = config.learner.warm_start
    if warm_start is not None and warm_start.demonstrations is not None:
        render_demonstrations(config, warm_start.demonstrations)


def _texts(task: Task, config: RunConfig) -> list[str]:
    """Return the prompt of a task and the responses of its scripted solution, with noise if the run has noise."""
    task = with_noise(task, config.tasks.noise, config.seed)
    conversation = Agent(config.agent).start_conversation(task.instruction)
    conversation.observe(Image.new("RGB", (config.desktop.width, config.desktop.height)))
    prompt = [
        content.text for message in conversation.prompt().messages for content in message.contents if content.text
    ]
    responses = [conversation.render(PolicyResponse(thought, action)) for thought, action in task.demonstrate()]
    return (prompt + responses) * _NUM_REPEATS
