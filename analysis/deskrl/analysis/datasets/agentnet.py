"""Reader of AgentNet, the dataset of OpenCUA: one JSON object per episode and line, and folders of screenshots.

    {"task_id": …, "instruction": …, "task_completed": true,
     "traj": [{"index": 0, "image": "….png",
               "value": {"thought": …, "code": "pyautogui.click(x=0.41, y=0.23)", "last_step_correct": true, …}}, …]}

Coordinates are fractions of the screenshot, which shows the screen before the action. Format: the dataset card of
huggingface.co/datasets/xlangai/AgentNet.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from deskrl.actor.agent.action_language import PolicyResponse
from deskrl.actor.agent.pyautogui_code import parse_code
from deskrl.actor.demonstrations import Player
from deskrl.analysis.datasets.recorded_episode import (
    RecordedEpisode,
    RecordedStep,
    UnreadableError,
    read_inside,
    read_lines,
    text_of,
)
from deskrl.core.left_out import LeftOut


def read_agentnet(paths: list[Path], images: Path | None, left_out: LeftOut) -> Iterator[RecordedEpisode]:
    """Yield the episodes of JSONL files.

    Args:
        paths: JSONL files.
        images: folder of the screenshots; None: the folder of each JSONL file, or a folder in it.
        left_out: counts what cannot be read.
    """
    for path in paths:
        root = path.parent if images is None else images
        # The folders that the archives are unpacked to are up to the user.
        folders = [root, *sorted(folder for folder in root.iterdir() if folder.is_dir())]
        for number, record in read_lines(path, left_out):
            name = f"{path.name}:{number}"
            steps = record.get("traj")
            instruction = text_of(record, "instruction") or text_of(record, "natural_language_task")
            if not isinstance(steps, list) or not instruction:
                missing = "traj" if instruction else "instruction"
                left_out.add("episode", f"it has no {missing}", name)
                continue
            completed = record.get("task_completed")
            yield RecordedEpisode(
                name=name,
                task_id=text_of(record, "task_id") or f"{path.stem}-{number}",
                instruction=instruction,
                source="AgentNet",
                steps=[_step(f"{name} step {index}", step, folders) for index, step in enumerate(steps)],
                reward=float(completed) if isinstance(completed, bool) else None,
                evidence={"task_completed": completed},
            )


def _step(name: str, step: Any, folders: list[Path]) -> RecordedStep:
    record = step if isinstance(step, dict) else {}
    value = record.get("value")
    value = value if isinstance(value, dict) else {}
    return RecordedStep(
        name=name,
        read_screenshot=partial(_read_screenshot, text_of(record, "image"), folders),
        read_action=partial(_read_action, value),
        thought=text_of(value, "thought"),
        player=Player.PERSON,
    )


def _read_screenshot(image: str, folders: list[Path]) -> bytes:
    if not image:
        raise UnreadableError("it names no screenshot")
    return read_inside(folders, image)


def _read_action(value: dict[str, Any], screen_size: tuple[int, int]) -> PolicyResponse:
    if value.get("last_step_correct") is False:
        raise UnreadableError("AgentNet marks it as incorrect")
    code = text_of(value, "code")
    if not code:
        raise UnreadableError("it has no code")
    return parse_code(code, fractions_of=screen_size)
