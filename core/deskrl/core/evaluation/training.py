"""A training run as it is compared with another one: successes by task over stretches of environment steps."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deskrl.core.config import RunConfig, read_resolved
from deskrl.core.errors import UserError
from deskrl.core.report.history import Count, Record, read_history, task_counts
from deskrl.core.runfolder import RunFolder


@dataclass(frozen=True)
class TrainedRun:
    """What a run has come to."""

    config: RunConfig
    updates: Sequence[Record]
    evaluations: Mapping[str, Mapping[str, Count]]
    """By `when`, and by task."""

    @property
    def num_env_steps(self) -> int:
        """Of all fresh episodes that were taken."""
        return sum(update["num_env_steps"] for update in self.updates)

    @property
    def training_s(self) -> float:
        """Wall clock of all updates."""
        return float(sum(sum(update["seconds"].values()) for update in self.updates))

    def counts_between(self, low: float, high: float) -> dict[str, Count]:
        """Fresh episodes and successes by task, of the updates that end in this stretch of environment steps."""
        ends = itertools.accumulate(update["num_env_steps"] for update in self.updates)
        found: dict[str, Count] = {}
        for update, end in zip(self.updates, ends, strict=True):
            if low < end <= high:
                for task, count in task_counts(update).items():
                    found[task] = found.get(task, Count(0, 0)) + count
        return found


def read_run(root: Path) -> TrainedRun:
    """A run's folder.

    Raises:
        UserError: it is none, or it has not learnt yet, or was made before environment steps were counted.
    """
    folder = RunFolder(root)
    history = read_history(folder)
    if not history.updates:
        raise UserError(f"{root} has not learnt yet", "name a run with at least one update")
    if any("num_env_steps" not in update for update in history.updates):
        raise UserError(f"{root} was made before environment steps were counted", "make it anew")
    evaluations = {when: evaluation.per_task for when, evaluation in history.evaluations.items()}
    return TrainedRun(read_resolved(folder.config), history.updates, evaluations)
