"""Training state of a run: what a checkpoint holds besides weights and optimizer states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class PendingCommit:
    """A batch that is committed to the replay service once the next checkpoint is on disk."""

    queue: str
    batch_id: str
    verdicts: list[dict[str, Any]]
    """Fields of deskrl.proto.v1.GroupVerdict."""


@dataclass
class TrainState:
    """Counters of a run; with the run's seed, they determine all random choices."""

    num_updates: int = 0
    """Number of updates; the step of the policy version."""
    num_planned: int = 0
    """Number of training groups planned."""
    num_taken: int = 0
    """Number of training groups taken into batches."""
    lineage: str = ""
    """Lineage of the policy version."""
    pending: list[PendingCommit] = field(default_factory=list)
    """Batches to commit."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Record of each update, for results/."""
    per_task: dict[str, dict[str, int]] = field(default_factory=dict)
    """Fresh training episodes and successes of each task: {"n": …, "success": …}."""

    def num_env_steps(self) -> int:
        """Return the number of steps of all fresh episodes in batches, dropped groups included."""
        return sum(record["num_env_steps"] for record in self.history)

    def last_success_rates(self) -> dict[str, float]:
        """Return the success rate of each task in the last update that had episodes of it."""
        rates = {}
        for record in self.history:
            for task_id, count in record["per_task"].items():
                rates[task_id] = count["success"] / count["n"]
        return rates

    def add_counts(self, per_task: Mapping[str, Mapping[str, int]]) -> None:
        """Add the episodes and successes of an update to the totals of the run."""
        for task_id, count in per_task.items():
            total = self.per_task.setdefault(task_id, {"n": 0, "success": 0})
            for key, value in count.items():
                total[key] += value

    def to_json(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> TrainState:
        """Return the state that `to_json` serialised."""
        fields = dict(value)
        fields["pending"] = [PendingCommit(**pending) for pending in fields["pending"]]
        return TrainState(**fields)
