"""From records and evidence to what the template shows: rows, charts, strips. Knows what is worth saying and in which
words; reads no file, asks no service, writes no markup.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from deskrl.core.config import RunConfig
from deskrl.core.report.evidence import Evidence, ShownEpisode
from deskrl.core.report.frames import Frame, frame_of
from deskrl.core.report.history import Count, History, number
from deskrl.core.stats import newcombe_difference
from deskrl.proto.v1 import replay_pb2, rollout_pb2

_MAX_EVIDENCE = 400


@dataclass(frozen=True)
class Comparison:
    """Success of one task, or of all, before and after."""

    name: str
    before: Count | None
    after: Count | None

    @property
    def difference(self) -> tuple[float, float, float] | None:
        """After minus before with its 95 % interval, in percentage points; None unless both sides have episodes."""
        if not (self.before and self.after and self.before.n and self.after.n):
            return None
        change = newcombe_difference(self.before.successes, self.before.n, self.after.successes, self.after.n)
        return change[0] * 100, change[1] * 100, change[2] * 100


@dataclass(frozen=True)
class EpisodeRow:
    """Episodes of one queue: how they ended, and how long they were."""

    queue: str
    count: Count
    mean_steps: float | None
    mean_steps_solved: float | None
    endings: list[tuple[str, int]]
    num_faulted: int


@dataclass(frozen=True)
class StoredRow:
    """Stored successes of one task."""

    task: str
    stored: int
    used: int
    newest: str


@dataclass(frozen=True)
class Strip:
    """One episode as a row of frames."""

    queue: str
    version: str
    reward: float
    ending: str
    num_steps: int
    duration_s: float
    evidence: str
    frames: list[Frame]


@dataclass(frozen=True)
class TaskStrips:
    """A task with its failed and its solved episode, and how many of four columns each one gets."""

    task: str
    instruction: str
    failed: Strip | None
    solved: Strip | None
    num_failed: int
    num_solved: int
    failed_columns: int

    @property
    def solved_columns(self) -> int:
        """The rest of the four."""
        return 4 - self.failed_columns


def comparisons(history: History) -> list[Comparison]:
    """Overall first, then each task; nothing if no evaluation was recorded."""
    before, after = history.evaluations.get("before"), history.evaluations.get("after")
    tasks = sorted({*(before.per_task if before else ()), *(after.per_task if after else ())})
    rows = [
        Comparison(task, before.per_task.get(task) if before else None, after.per_task.get(task) if after else None)
        for task in tasks
    ]
    overall = Comparison("all tasks", before.overall if before else None, after.overall if after else None)
    return [overall, *rows] if before or after else []


def episode_rows(evidence: Evidence, success_above: float) -> list[EpisodeRow]:
    """One row for each queue, in the order in which queues first ended an episode."""
    by_queue: dict[str, list[replay_pb2.Episode]] = {}
    for envelope in sorted(evidence.envelopes, key=lambda it: it.finished_unix_s):
        by_queue.setdefault(envelope.queue, []).append(envelope)
    return [_episode_row(queue, episodes, success_above) for queue, episodes in by_queue.items()]


def _episode_row(queue: str, episodes: Sequence[replay_pb2.Episode], success_above: float) -> EpisodeRow:
    results = [episode.result for episode in episodes if episode.HasField("result")]
    solved = [result for result in results if result.reward > success_above]
    endings = Counter(result.termination for result in results)
    return EpisodeRow(
        queue,
        Count(len(solved), len(results)),
        _mean(result.num_steps for result in results),
        _mean(result.num_steps for result in solved),
        [(ending_name(ending), num) for ending, num in endings.most_common()],
        len(episodes) - len(results),
    )


def ending_name(termination: rollout_pb2.Termination) -> str:
    """A termination in words."""
    return _words(rollout_pb2.Termination.Name(termination), "TERMINATION_")


def counts_in_words(counts: Mapping[str, int], prefix: str = "") -> list[tuple[str, int]]:
    """Names made readable, largest count first."""
    return sorted(((_words(name, prefix), num) for name, num in counts.items() if num), key=lambda it: (-it[1], it[0]))


def dropped_groups(history: History, evidence: Evidence) -> list[tuple[str, int]]:
    """Groups that were not learnt from, by cause: as replay counts them, else as the updates tell."""
    if evidence.status is not None:
        return counts_in_words(evidence.status.dropped)
    causes: Counter[str] = Counter()
    for record in history.updates:
        dropped = record.get("dropped")
        if isinstance(dropped, dict):
            causes.update({str(cause): int(number(dropped, cause) or 0) for cause in dropped})
    return counts_in_words(causes)


def stored_rows(evidence: Evidence) -> list[StoredRow]:
    """Stored successes by task."""
    successes = evidence.status.successes if evidence.status is not None else ()
    return [
        StoredRow(it.task_id, it.num_stored, it.num_used, str(it.newest_version.step) if it.num_stored else "–")
        for it in sorted(successes, key=lambda it: it.task_id)
    ]


def task_strips(evidence: Evidence, history: History, config: RunConfig) -> list[TaskStrips]:
    """Each task's episodes, side by side; the longer one gets more of the width."""
    rows = []
    for task in evidence.tasks:
        failed, solved = (_strip(shown, config) for shown in (task.failed, task.solved))
        num_failed, num_solved = (len(strip.frames) if strip else 0 for strip in (failed, solved))
        rows.append(
            TaskStrips(
                task.task_id,
                history.instructions.get(task.task_id, ""),
                failed,
                solved,
                task.num_failed,
                task.num_solved,
                split_columns(num_failed, num_solved),
            )
        )
    return rows


def split_columns(num_failed: int, num_solved: int) -> int:
    """How many of the four columns the failed episode gets, so that both are about as tall."""

    def heights(columns: int) -> tuple[int, int]:
        failed, solved = math.ceil(num_failed / columns), math.ceil(num_solved / (4 - columns))
        return max(failed, solved), abs(failed - solved)

    return min((2, 1, 3), key=heights)


def _strip(shown: ShownEpisode | None, config: RunConfig) -> Strip | None:
    if shown is None:
        return None
    result = shown.envelope.result
    steps = [step for step in shown.steps if step is not None]
    frames = [frame_of(step, config.desktop.width, config.desktop.height) for step in steps]
    if result.final_image_hash and (not frames or frames[-1].image != result.final_image_hash):
        frames.append(Frame(None, result.final_image_hash, None, "", "plain", "", ""))
    return Strip(
        queue=shown.envelope.queue,
        version=_versions({(span.lineage, span.step) for step in steps for span in step.spans}),
        reward=result.reward,
        ending=ending_name(result.termination),
        num_steps=result.num_steps,
        duration_s=result.duration_s,
        evidence=result.evidence_json[:_MAX_EVIDENCE],
        frames=frames,
    )


def _versions(seen: Iterable[tuple[str, int]]) -> str:
    """The policy versions of an episode: one number, or from the oldest to the newest."""
    steps = sorted({step for _, step in seen})
    if not steps:
        return "unknown version"
    return f"version {steps[0]}" if len(steps) == 1 else f"versions {steps[0]}–{steps[-1]}"


def span_text(seconds: float) -> str:
    """A duration: 4.2 s, 48 s, 9 min 12 s, 3 h 05 min."""
    if seconds < 10:
        return f"{seconds:.1f}\N{NO-BREAK SPACE}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}\N{NO-BREAK SPACE}s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def points_text(points: float) -> str:
    """Percentage points with their sign."""
    whole = round(points)
    return f"{whole:+d}".replace("-", "−") if whole else "0"


def percent_text(share: float | None) -> str:
    """A share as a whole percentage."""
    return "–" if share is None else f"{share:.0%}"


def date_text(unix_s: float) -> str:
    """A moment in UTC."""
    return time.strftime("%-d %B %Y, %H:%M UTC", time.gmtime(unix_s))


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None


def _words(name: str, prefix: str) -> str:
    return name.removeprefix(prefix).lower().replace("_", " ")
