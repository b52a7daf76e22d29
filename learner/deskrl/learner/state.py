"""What the learner remembers between updates, and so what a checkpoint must hold besides the weights. Plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class PendingCommit:
    """A batch that the next checkpoint ends: replay is told once that checkpoint is on disk."""

    queue: str
    batch_id: str
    verdicts: list[dict[str, Any]]
    """Fields of deskrl.proto.v1.GroupVerdict."""


@dataclass
class LearnerState:
    """Counters of a run; everything random follows from them and the run's seed."""

    num_updates: int = 0
    """Batches learnt from; the step of the policy version."""
    num_planned: int = 0
    """Training groups planned."""
    num_taken: int = 0
    """Training groups taken by the batches so far."""
    lineage: str = ""
    """Under which this state was reached."""
    pending: list[PendingCommit] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    """One short record an update, for results/."""
    per_task: dict[str, dict[str, int]] = field(default_factory=dict)
    """Fresh training episodes and successes of each task: {"n": …, "success": …}."""

    def num_env_steps(self) -> int:
        """Steps of all fresh episodes that were taken, learnt from or not."""
        return sum(record["num_env_steps"] for record in self.history)

    def last_rates(self) -> dict[str, float]:
        """The success rate of each task in the update that last played it."""
        rates = {}
        for record in self.history:
            for task_id, count in record["per_task"].items():
                rates[task_id] = count["success"] / count["n"]
        return rates

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> LearnerState:
        """What `to_json` gave."""
        fields = dict(value)
        fields["pending"] = [PendingCommit(**pending) for pending in fields["pending"]]
        return LearnerState(**fields)
