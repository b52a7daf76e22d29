"""What the other roles need to know of the tasks before a run starts, written into its folder.

`tasks.json` is the plan's material: {task id: task file}. `corpus.txt` holds, parted by form feeds, the texts that the
policy reads and writes in these tasks: the tiny model's tokenizer is trained on it. Starts no desktop.
"""

from __future__ import annotations

import json

from PIL import Image

from deskrl.actor.agent import make_agent
from deskrl.actor.grammar import Turn
from deskrl.actor.tasks import Task, load_tasks
from deskrl.core.config import RunConfig
from deskrl.core.runfolder import write_atomically, write_json

_NUM_REPEATS = 8
"""The tokenizer merges what comes often: the tasks' own words before the numbers that no task needs."""


def load(config: RunConfig) -> tuple[Task, ...]:
    """The tasks of a run; raises UserError if one is unknown or invalid."""
    return tuple(load_tasks(config.tasks.suite, config.tasks.tasks))


def main(config: RunConfig) -> None:
    """Write both files; raises UserError as `load` does."""
    tasks = load(config)
    write_json(config.folder / "tasks.json", {task.id: json.loads(task.data) for task in tasks})
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
