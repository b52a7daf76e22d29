"""Progress of a run, computed from its metrics and the counters of the replay service."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deskrl.core.config import RunConfig
from deskrl.proto.v1 import replay_pb2


@dataclass(frozen=True)
class Progress:
    """Snapshot of a run in progress."""

    phase: str
    elapsed_s: float
    num_updates: int
    num_env_steps: int
    """Environment steps of the fresh episodes in all updates."""
    num_episodes: int
    num_running: int
    success_rate: float | None
    """Success rate of the newest update's fresh episodes, or of the evaluation in progress; None: not known yet."""
    version: str
    env_steps_per_minute: float
    num_faults: int
    left_s: float | None


class ProgressMeter:
    """Computes Progress; keeps the step counters of the last minute for rates."""

    def __init__(self, config: RunConfig, started_unix_s: float) -> None:
        self._config = config
        self._started_unix_s = started_unix_s
        self._steps_seen: list[tuple[float, int]] = []

    def read(self, metrics: Sequence[dict[str, Any]], status: replay_pb2.GetReplayStatusResponse | None) -> Progress:
        """Return the present progress.

        Args:
            metrics: lines of metrics.jsonl, oldest first.
            status: counters of the replay service, or None if it does not answer.
        """
        now = time.time()
        queues = list(status.queues) if status else []
        num_steps = sum(queue.num_steps for queue in queues)
        phases = [line for line in metrics if line["kind"] == "phase"]
        updates = [line for line in metrics if line["kind"] == "update"]
        phase = phases[-1]["phase"] if phases else "starting"
        return Progress(
            phase=phase,
            elapsed_s=now - self._started_unix_s,
            num_updates=updates[-1]["update"] if updates else 0,
            num_env_steps=_num_env_steps(updates),
            num_episodes=sum(queue.num_finished for queue in queues),
            num_running=sum(queue.num_leased for queue in queues),
            success_rate=_success_rate(phase, updates, queues),
            version=_version(metrics),
            env_steps_per_minute=self._rate(now, num_steps) * 60,
            num_faults=sum(status.faults.values()) if status else 0,
            left_s=self._left_s(phase, updates, queues),
        )

    def _rate(self, now: float, num_steps: int) -> float:
        self._steps_seen = [(at, num) for at, num in self._steps_seen if at > now - 60] + [(now, num_steps)]
        (first_at, first), (last_at, last) = self._steps_seen[0], self._steps_seen[-1]
        return (last - first) / (last_at - first_at) if last_at - first_at > 1 else 0.0

    def _updates_left(self, updates: Sequence[dict[str, Any]]) -> float:
        """Return the number of updates until the limit on updates or on environment steps is reached."""
        grpo = self._config.learner.grpo
        num_updates, num_env_steps = int(updates[-1]["update"]), _num_env_steps(updates)
        left = max(0, grpo.num_updates - num_updates)
        if not grpo.max_env_steps or not num_env_steps:
            return left
        return min(left, max(0, grpo.max_env_steps - num_env_steps) * num_updates / num_env_steps)

    def _left_s(
        self, phase: str, updates: Sequence[dict[str, Any]], queues: Sequence[replay_pb2.QueueStatus]
    ) -> float | None:
        """Return the estimated seconds until the end of the run; None before three updates."""
        times = [line["unix_s"] for line in updates][-8:]
        if len(times) < 3:
            return None
        per_update_s = statistics.median(later - earlier for earlier, later in itertools.pairwise(times))
        updates_left = self._updates_left(updates)
        evals = {queue.queue: queue.num_finished for queue in queues if queue.queue.startswith("eval/")}
        per_update_episodes = self._config.learner.grpo.groups_per_batch * self._config.tasks.num_rollouts
        episodes_left = max(0, self._config.learner.eval.num_episodes - evals.get("eval/after", 0))
        return float(updates_left * per_update_s + episodes_left * per_update_s / per_update_episodes)


def _num_env_steps(updates: Sequence[dict[str, Any]]) -> int:
    """Return the environment steps of all updates, each counted once by its newest record."""
    return sum({line["update"]: line.get("num_env_steps", 0) for line in updates}.values())


def _success_rate(
    phase: str, updates: Sequence[dict[str, Any]], queues: Sequence[replay_pb2.QueueStatus]
) -> float | None:
    if phase.startswith("eval"):
        evaluation = next((queue for queue in queues if queue.queue == phase), None)
        return evaluation.num_succeeded / evaluation.num_finished if evaluation and evaluation.num_finished else None
    return updates[-1].get("success_rate") if updates else None


def _version(metrics: Sequence[dict[str, Any]]) -> str:
    versions = [line.get("version") for line in metrics if line["kind"] in ("update", "weights")]
    return str(versions[-1]) if versions else "-"
