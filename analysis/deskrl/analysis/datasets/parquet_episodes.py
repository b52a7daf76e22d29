"""Reader of the datasets that `deskrl data export` writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa

from deskrl.actor.actions import Action
from deskrl.actor.agent.action_language import PolicyResponse
from deskrl.actor.agent.conversation import map_points
from deskrl.analysis.datasets.parquet_schema import open_dataset_file
from deskrl.analysis.datasets.recorded_episode import RecordedEpisode, RecordedStep, UnreadableError, find_thought
from deskrl.core.errors import UserError
from deskrl.core.left_out import LeftOut

_READ_ROWS = 16
"""Rows that are read at a time, with their screenshots."""
_COLUMNS = [
    "episode_id", "task_id", "seed", "instruction", "step", "num_steps", "screenshot", "screen_width", "screen_height",
    "text", "action", "reward", "termination",
]  # fmt: skip


def read_parquet(paths: list[Path], left_out: LeftOut) -> Iterator[RecordedEpisode]:
    """Yield the episodes of Parquet files.

    Raises:
        UserError: a file is not a dataset of this format version. All files are checked before the first is read.
    """
    for path in paths:
        open_dataset_file(path).close()
    for path in paths:
        for episode_id, rows in groupby(_rows(path), key=lambda row: row["episode_id"]):
            steps = list(rows)
            first = steps[0]
            name = f"{path.name} {episode_id}"
            if any(first[column] is None for column in ("task_id", "seed", "instruction", "text", "termination")):
                left_out.add("episode", "its row lacks a value", name)
                continue
            if len(steps) != first["num_steps"]:
                left_out.add("episode", "some of its rows are missing", name)
                continue
            yield RecordedEpisode(
                name=name,
                task_id=first["task_id"],
                instruction=first["instruction"],
                source="deskrl data export",
                steps=[_step(name, row) for row in steps],
                reward=first["reward"],
                seed=first["seed"],
                termination=first["termination"],
            )


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with open_dataset_file(path) as file:
            for batch in file.iter_batches(batch_size=_READ_ROWS, columns=_COLUMNS):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        problem = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: damaged: {problem}", "restore the file from a copy") from error


def _step(name: str, row: dict[str, Any]) -> RecordedStep:
    return RecordedStep(
        name=f"{name} step {row['step']}",
        read_screenshot=partial(_read_screenshot, row),
        read_action=partial(_read_action, row),
        thought=find_thought(row["text"] or ""),
    )


def _read_screenshot(row: dict[str, Any]) -> bytes:
    data = (row["screenshot"] or {}).get("bytes")
    if not data:
        raise UnreadableError("its row has no screenshot")
    return bytes(data)


def _read_action(row: dict[str, Any], screen_size: tuple[int, int]) -> PolicyResponse:
    """Return the action in pixels of the screenshot, which may have been resized for the policy."""
    if not row["action"]:
        raise UnreadableError("its output could not be parsed as an action")
    try:
        action = msgspec.convert(json.loads(row["action"]), Action)
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors too
        raise UnreadableError("its action is none that deskrl has", str(error)[:80]) from error
    recorded_size = row["screen_width"] or 0, row["screen_height"] or 0
    if min(recorded_size) < 1:
        raise UnreadableError("its row has no screen size")
    if action.has_point and recorded_size != screen_size:
        action = map_points(action, recorded_size, screen_size)
    return PolicyResponse("", action)
