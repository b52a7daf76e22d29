"""Data that a report takes from the replay store: counters, all episodes, and example episodes with screenshots."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from deskrl.core.errors import UserError
from deskrl.core.group_outcome import is_success
from deskrl.core.step_codec import CodecError, Step, decode_step
from deskrl.proto.v1 import replay_pb2, rollout_pb2
from deskrl.replay.store_reader import ImageDamaged, ImageUnavailable, StoreReader, StoreSnapshot
from deskrl.replay.stored_episodes import EpisodeFilter, EpisodeRecord

_log = logging.getLogger(__name__)

MAX_IMAGES = 400
"""Number of screenshots on a page after which further tasks are only named."""


@dataclass(frozen=True)
class ExampleEpisode:
    """An episode with its decoded steps; a step that cannot be decoded is None."""

    record: EpisodeRecord
    result: rollout_pb2.EpisodeResult
    steps: list[Step | None]

    @property
    def image_names(self) -> list[str]:
        """Screenshots of the steps in order, then the one of the end state."""
        names = [step.screenshot for step in self.steps if step is not None]
        return [name for name in [*names, self.result.final_image_hash] if name]


@dataclass(frozen=True)
class TaskExamples:
    """One failed and one solved episode of a task, where any is stored, and the number of such episodes."""

    task_id: str
    failed: ExampleEpisode | None
    solved: ExampleEpisode | None
    num_failed: int
    num_solved: int


@dataclass(frozen=True)
class ReplayData:
    """Contents of a replay store that a report shows."""

    status: replay_pb2.GetReplayStatusResponse | None = None
    episodes: list[EpisodeRecord] = field(default_factory=list)
    tasks: list[TaskExamples] = field(default_factory=list)
    images: dict[str, bytes] = field(default_factory=dict)
    """PNG bytes of the screenshots of all examples."""
    tasks_not_shown: list[str] = field(default_factory=list)
    """Tasks without examples because the page has reached its limit of screenshots."""
    problem: str = ""
    """Why the store could not be read, or not completely; empty if it was."""


def read_replay_data(
    folder: Path,
    task_order: Sequence[str],
    success_threshold: float,
    *,
    queue: str = "",
    max_images: int = MAX_IMAGES,
) -> ReplayData:
    """Read what a report shows of a store, beside a replay service that may be writing.

    Args:
        folder: replay folder of the run.
        task_order: task ids to show first; further tasks follow alphabetically.
        success_threshold: a reward above this is a success.
        queue: queue to which the episodes are restricted; empty: all queues.
        max_images: number of screenshots after which further tasks are only named.
    """
    data = ReplayData()
    try:
        reader = StoreReader(folder)
        with reader.snapshot() as snapshot:
            data = ReplayData(snapshot.status(), snapshot.list_episodes(EpisodeFilter(queue=queue)))
            data = _add_examples(data, snapshot, task_order, success_threshold, max_images)
            if num_damaged := snapshot.num_damaged():
                data = replace(data, problem=f"{num_damaged} episodes are damaged on the disk of the replay service")
        return replace(data, images=_read_images(reader, data.tasks))
    except UserError as error:
        problem = error.message
    except (sqlite3.Error, OSError) as error:
        problem = f"the replay store in {folder} cannot be read: {error}"
    _log.warning("report: %s", problem)
    return replace(data, problem=problem)


def rank_examples(
    episodes: Sequence[EpisodeRecord], success_threshold: float
) -> tuple[list[EpisodeRecord], list[EpisodeRecord]]:
    """Return failed and solved episodes, each list with the most instructive example first.

    Failures: more than one step before a single step, then lowest reward, then earliest. Successes: highest reward,
    then latest.
    """
    ended = [(it, it.result, it.ended_unix_s or 0.0) for it in episodes if it.result is not None]
    failed = [it for it in ended if not is_success(it[1].reward, success_threshold)]
    solved = [it for it in ended if is_success(it[1].reward, success_threshold)]
    failed.sort(key=lambda it: (it[1].num_steps < 2, it[1].reward, it[2]))
    solved.sort(key=lambda it: (-it[1].reward, -it[2]))
    return [it[0] for it in failed], [it[0] for it in solved]


def _add_examples(
    data: ReplayData,
    snapshot: StoreSnapshot,
    task_order: Sequence[str],
    success_threshold: float,
    max_images: int,
) -> ReplayData:
    by_task: dict[str, list[EpisodeRecord]] = {}
    for episode in data.episodes:
        if episode.acting_policy != rollout_pb2.ACTING_POLICY_SCRIPTED and episode.result is not None:
            by_task.setdefault(episode.task_id, []).append(episode)
    tasks: list[TaskExamples] = []
    names: set[str] = set()
    not_shown: list[str] = []
    for task in dict.fromkeys([*task_order, *sorted(by_task)]):
        if len(names) >= max_images:
            not_shown.append(task)
            continue
        failed, solved = rank_examples(by_task.get(task, []), success_threshold)
        shown = _read_example(snapshot, failed), _read_example(snapshot, solved)
        names.update(name for example in shown if example is not None for name in example.image_names)
        tasks.append(TaskExamples(task, *shown, len(failed), len(solved)))
    return replace(data, tasks=tasks, tasks_not_shown=not_shown)


def _read_example(snapshot: StoreSnapshot, ranked: Sequence[EpisodeRecord]) -> ExampleEpisode | None:
    """Read the first of these episodes that is neither damaged nor removed by retention."""
    for record in ranked:
        if record.removed or record.damage or record.result is None:
            continue
        try:
            payloads = snapshot.step_payloads(record)
        except CodecError as error:
            _log.warning("report: %s is left out: %s", record.episode_id, error)
            continue
        return ExampleEpisode(record, record.result, [_decode(payload) for payload in payloads])
    return None


def _decode(payload: bytes) -> Step | None:
    try:
        return decode_step(payload)
    except CodecError as error:
        _log.warning("report: a damaged step is left out: %s", error)
        return None


def _read_images(reader: StoreReader, tasks: Iterable[TaskExamples]) -> dict[str, bytes]:
    """Read the screenshots of all examples; one that is missing or damaged leaves a gap on the page."""
    examples = [example for task in tasks for example in (task.failed, task.solved) if example is not None]
    images = {}
    for name in dict.fromkeys(name for example in examples for name in example.image_names):
        try:
            images[name] = reader.read_image(name)
        except (ImageUnavailable, ImageDamaged) as error:
            _log.warning("report: a screenshot is left out: %s", error)
    return images
