"""View models of the run report: rows and episode strips, built from the run's records and its replay data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from deskrl.analysis.formatting import enum_words, format_evidence, sorted_counts
from deskrl.analysis.report.replay_data import ExampleEpisode, ReplayData
from deskrl.analysis.report.run_history import Count, RunHistory, number
from deskrl.analysis.report.step_frames import Frame, make_frame
from deskrl.core.config import RunConfig
from deskrl.core.group_outcome import is_success
from deskrl.launch.confidence_intervals import newcombe_difference
from deskrl.proto.v1 import rollout_pb2
from deskrl.replay.stored_episodes import EpisodeRecord

_MAX_EVIDENCE = 400


@dataclass(frozen=True)
class Comparison:
    """Success rate of one task, or of all, before and after training."""

    name: str
    before: Count | None
    after: Count | None

    @property
    def difference(self) -> tuple[float, float, float] | None:
        """Change of the rate and its 95 % interval in percentage points; None unless both sides have episodes."""
        if not (self.before and self.after and self.before.n and self.after.n):
            return None
        change = newcombe_difference(self.before.successes, self.before.n, self.after.successes, self.after.n)
        return change[0] * 100, change[1] * 100, change[2] * 100


@dataclass(frozen=True)
class EpisodeRow:
    """Statistics of the episodes of one queue."""

    queue: str
    count: Count
    mean_steps: float | None
    mean_steps_solved: float | None
    terminations: list[tuple[str, int]]
    num_faulted: int


@dataclass(frozen=True)
class SuccessBufferRow:
    """Contents and use of the success buffer for one task."""

    task: str
    stored: int
    used: int
    newest_version: str


@dataclass(frozen=True)
class EpisodeStrip:
    """One episode as a row of frames."""

    queue: str
    version: str
    reward: float
    termination: str
    num_steps: int
    duration_s: float
    evidence: str
    frames: list[Frame]


@dataclass(frozen=True)
class TaskStrips:
    """A task with a failed and a solved episode, and the number of columns, out of four, for each."""

    task: str
    instruction: str
    failed: EpisodeStrip | None
    solved: EpisodeStrip | None
    num_failed: int
    num_solved: int
    failed_columns: int

    @property
    def solved_columns(self) -> int:
        """Number of columns for the solved episode."""
        return 4 - self.failed_columns


def comparisons(history: RunHistory) -> list[Comparison]:
    """Return the overall comparison, then one for each task; empty if no evaluation was recorded."""
    before, after = history.evaluations.get("before"), history.evaluations.get("after")
    tasks = sorted({*(before.per_task if before else ()), *(after.per_task if after else ())})
    rows = [
        Comparison(task, before.per_task.get(task) if before else None, after.per_task.get(task) if after else None)
        for task in tasks
    ]
    overall = Comparison("all tasks", before.overall if before else None, after.overall if after else None)
    return [overall, *rows] if before or after else []


def episode_rows(replay: ReplayData, success_threshold: float) -> list[EpisodeRow]:
    """Return one row for each queue, in the order of its first ended episode."""
    by_queue: dict[str, list[EpisodeRecord]] = {}
    for episode in sorted(replay.episodes, key=lambda it: it.ending or 0):
        by_queue.setdefault(episode.queue, []).append(episode)
    return [_episode_row(queue, episodes, success_threshold) for queue, episodes in by_queue.items()]


def _episode_row(queue: str, episodes: Sequence[EpisodeRecord], success_threshold: float) -> EpisodeRow:
    results = [episode.result for episode in episodes if episode.result is not None]
    solved = [result for result in results if is_success(result.reward, success_threshold)]
    terminations = Counter(result.termination for result in results)
    return EpisodeRow(
        queue,
        Count(len(solved), len(results)),
        _mean(result.num_steps for result in results),
        _mean(result.num_steps for result in solved),
        [(termination_words(it), num) for it, num in terminations.most_common()],
        len(episodes) - len(results),
    )


def termination_words(termination: rollout_pb2.Termination) -> str:
    """Return a termination in words."""
    return enum_words(rollout_pb2.Termination.Name(termination), "TERMINATION_")


def dropped_groups(history: RunHistory, replay: ReplayData) -> list[tuple[str, int]]:
    """Return the number of dropped groups by cause, as counted by replay or, without its data, by the updates."""
    if replay.status is not None:
        return sorted_counts(replay.status.dropped)
    causes: Counter[str] = Counter()
    for record in history.updates:
        dropped = record.get("dropped")
        if isinstance(dropped, dict):
            causes.update({str(cause): int(number(dropped, cause) or 0) for cause in dropped})
    return sorted_counts(causes)


def success_buffer_rows(replay: ReplayData) -> list[SuccessBufferRow]:
    """Return the success buffer by task."""
    successes = replay.status.successes if replay.status is not None else ()
    return [
        SuccessBufferRow(it.task_id, it.num_stored, it.num_used, str(it.newest_version.step) if it.num_stored else "–")
        for it in sorted(successes, key=lambda it: it.task_id)
    ]


def task_strips(replay: ReplayData, instructions: Mapping[str, str], config: RunConfig) -> list[TaskStrips]:
    """Return the example episodes of each task; the longer one gets more of the width.

    Args:
        replay: examples by task.
        instructions: instruction by task id.
        config: run configuration.
    """
    rows = []
    for task in replay.tasks:
        failed, solved = (_strip(example, config) for example in (task.failed, task.solved))
        num_failed, num_solved = (len(strip.frames) if strip else 0 for strip in (failed, solved))
        rows.append(
            TaskStrips(
                task.task_id,
                instructions.get(task.task_id, ""),
                failed,
                solved,
                task.num_failed,
                task.num_solved,
                split_columns(num_failed, num_solved),
            )
        )
    return rows


def split_columns(num_failed: int, num_solved: int) -> int:
    """Return the number of columns, out of four, for the failed episode so that both are about equally tall."""

    def heights(columns: int) -> tuple[int, int]:
        failed, solved = math.ceil(num_failed / columns), math.ceil(num_solved / (4 - columns))
        return max(failed, solved), abs(failed - solved)

    return min((2, 1, 3), key=heights)


def _strip(example: ExampleEpisode | None, config: RunConfig) -> EpisodeStrip | None:
    if example is None:
        return None
    result = example.result
    steps = [step for step in example.steps if step is not None]
    frames = [make_frame(step, config.desktop.width, config.desktop.height) for step in steps]
    if result.final_image_hash and (not frames or frames[-1].image != result.final_image_hash):
        frames.append(Frame(None, result.final_image_hash, None, "", "plain", "", ""))
    return EpisodeStrip(
        queue=example.record.queue,
        version=_versions({(span.lineage, span.step) for step in steps for span in step.spans}),
        reward=result.reward,
        termination=termination_words(result.termination),
        num_steps=result.num_steps,
        duration_s=result.duration_s,
        evidence=format_evidence(result.evidence_json)[:_MAX_EVIDENCE],
        frames=frames,
    )


def _versions(seen: Iterable[tuple[str, int]]) -> str:
    """Return the policy versions of an episode in words: one number, or oldest to newest."""
    steps = sorted({step for _, step in seen})
    if not steps:
        return "unknown version"
    return f"version {steps[0]}" if len(steps) == 1 else f"versions {steps[0]}–{steps[-1]}"


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None
