"""What the other roles need to know of the tasks before a run starts, written into its folder.

`tasks.json` is the plan's material: {task id: task file}, `applications.json` says to which application each belongs.
`corpus.txt` holds, parted by form feeds, the texts that the
policy reads and writes in these tasks: the tiny model's tokenizer is trained on it. `left_out.json` says which tasks
are not played, and why; it is there if there are any. Starts no desktop.
"""

from __future__ import annotations

import json
from collections import Counter

from PIL import Image

from deskrl.actor.agent.conversation import make_agent
from deskrl.actor.agent.grammar import Turn
from deskrl.actor.tasks.files import OWN_SUITE, SIMULATED_SUITE, Task, load_tasks
from deskrl.actor.tasks.lists import load_list
from deskrl.actor.tasks.playable import split_playable
from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.runfolder import write_atomically, write_json

_NUM_REPEATS = 8
"""The tokenizer merges what comes often: the tasks' own words before the numbers that no task needs."""


def load(config: RunConfig) -> tuple[list[Task], dict[str, list[str]]]:
    """The tasks that a run plays, and why others of its list are left out: reasons by task id.

    Raises:
        UserError: a task is unknown, invalid, twice there, or lacks what the run needs of it.
    """
    source = config.tasks
    if source.list is not None:
        tasks = load_list(source.list, source.root, source.suffix)
    else:
        own_suite = SIMULATED_SUITE if config.desktop.provider == "simulated" else OWN_SUITE
        tasks = load_tasks(source.suite or own_suite, source.tasks)
    if twice := [name for name, times in Counter(task.id for task in tasks).items() if times > 1]:
        raise UserError(f"{len(twice)} tasks are there twice: {', '.join(twice)}", "give each task an id of its own")
    playable, left_out = split_playable(tasks, config)
    without = [task.id for task in playable if not task.solution]
    if config.learner.warm_start is not None and without:
        raise UserError(
            f"learner.warm_start imitates scripted solutions, and {len(without)} of {len(playable)} tasks have none: "
            + ", ".join(without[:3])
            + (", …" if len(without) > 3 else ""),
            "unset learner.warm_start, or choose other tasks",
        )
    return playable, left_out


def count(config: RunConfig) -> int:
    """How many tasks a run plays where its desktops are: on another machine than this one perhaps.

    Raises:
        UserError: a task is unknown, invalid or twice there.
    """
    if config.tasks.unplayable == "refuse":
        config = config.model_copy(update={"tasks": config.tasks.model_copy(update={"unplayable": "play"})})
    return len(load(config)[0])


def main(config: RunConfig) -> None:
    """Write the files; raises UserError as `load` does."""
    tasks, left_out = load(config)
    if left_out:
        total = len(tasks) + len(left_out)
        path = config.folder / "left_out.json"
        print(f"playing {len(tasks)} of {total} tasks; {path} tells why the others are left out", flush=True)
        write_json(path, left_out)
    write_json(config.folder / "tasks.json", {task.id: json.loads(task.data) for task in tasks})
    write_json(config.folder / "applications.json", {task.id: task.domain for task in tasks})
    texts = [text for task in tasks for text in _texts(task, config)]
    write_atomically(config.folder / "corpus.txt", "\f".join(texts).encode())


def _texts(task: Task, config: RunConfig) -> list[str]:
    """The prompt of a task, and the answers of its scripted solution."""
    conversation = make_agent(config.agent).begin(task.instruction)
    conversation.observe(Image.new("RGB", (config.desktop.width, config.desktop.height)))
    prompt = [
        content.text for message in conversation.prompt().messages for content in message.contents if content.text
    ]
    answers = [conversation.render(Turn(thought, action)) for thought, action in task.demonstrate()]
    return (prompt + answers) * _NUM_REPEATS
