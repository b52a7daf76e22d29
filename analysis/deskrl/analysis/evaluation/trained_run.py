"""A training run as `deskrl compare` reads it: successes by task over ranges of environment steps."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deskrl.analysis.report.run_history import Count, Record, read_history, task_counts
from deskrl.core.config import RunConfig, read_resolved
from deskrl.core.errors import UserError
from deskrl.core.run_dir import RunDir


@dataclass(frozen=True)
class TrainedRun:
    """Records of a training run."""

    config: RunConfig
    updates: Sequence[Record]
    evaluations: Mapping[str, Mapping[str, Count]]
    """Successes and episodes by `when` (before, after) and by task."""

    @property
    def num_env_steps(self) -> int:
        """Environment steps of all fresh episodes that the learner took."""
        return sum(update["num_env_steps"] for update in self.updates)

    @property
    def training_s(self) -> float:
        """Wall-clock seconds of all updates."""
        return float(sum(sum(update["seconds"].values()) for update in self.updates))

    def counts_between(self, low: float, high: float) -> dict[str, Count]:
        """Return successes and fresh episodes by task of the updates that end in this range of environment steps."""
        ends = itertools.accumulate(update["num_env_steps"] for update in self.updates)
        counts: dict[str, Count] = {}
        for update, end in zip(self.updates, ends, strict=True):
            if low < end <= high:
                for task, count in task_counts(update).items():
                    counts[task] = counts.get(task, Count(0, 0)) + count
        return counts


def read_trained_run(root: Path) -> TrainedRun:
    """Read a run directory.

    Raises:
        UserError: it has no update, or is of a version that did not count environment steps.
    """
    run_dir = RunDir(root)
    history = read_history(run_dir)
    if not history.updates:
        raise UserError(f"{root}: the run has no update yet", "name a run with at least one update")
    if any("num_env_steps" not in update for update in history.updates):
        raise UserError(f"{root}: the records have no environment steps (older version)", "repeat the run")
    evaluations = {when: evaluation.per_task for when, evaluation in history.evaluations.items()}
    return TrainedRun(read_resolved(run_dir.config), history.updates, evaluations)
