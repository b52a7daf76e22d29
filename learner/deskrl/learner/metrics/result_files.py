"""Result files of a run, in results/ of the run directory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from deskrl.core.file_io import write_json
from deskrl.core.run_dir import RunDir
from deskrl.proto.v1 import replay_pb2

_MEANS = ("average_reward", "success_rate", "policy_loss", "learning_rate", "gradient_norm")


def by_epoch(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one record per epoch: means over its updates, and the size and use of the success buffer."""
    epochs: dict[int, list[Mapping[str, Any]]] = {}
    for record in history:
        epochs.setdefault(record["epoch"], []).append(record)
    result = []
    for epoch, records in sorted(epochs.items()):
        merged: dict[str, Any] = {"epoch": epoch, "updates": len(records)}
        for key in _MEANS:
            values = [record[key] for record in records if record[key] is not None]
            merged[key] = sum(values) / len(values) if values else None
        merged["replay_buffer_size"] = records[-1]["replay_buffer_size"]
        merged["replay_buffer_usage"] = sum(record["replayed"] for record in records)
        result.append(merged)
    return result


class ResultFiles:
    """Reads and writes the result files of one run.

    Args:
        folder: run directory.
        tasks: content of the task file by task id.
    """

    def __init__(self, folder: RunDir, tasks: Mapping[str, Mapping[str, Any]]) -> None:
        self._folder = folder
        self._tasks = tasks
        self._evaluation = folder.results / "evaluation.json"

    def evaluations(self) -> dict[str, Any]:
        """Return the records of the evaluations that are complete: {"before": …, "after": …}."""
        if not self._evaluation.exists():
            return {}
        done: dict[str, Any] = json.loads(self._evaluation.read_text(encoding="utf-8"))
        return done

    def add_evaluation(self, when: str, record: Mapping[str, Any]) -> None:
        """Add the record of an evaluation."""
        write_json(self._evaluation, {**self.evaluations(), when: record})

    def write(
        self,
        history: Sequence[Mapping[str, Any]],
        per_task: Mapping[str, Mapping[str, int]],
        status: replay_pb2.GetReplayStatusResponse,
    ) -> None:
        """Write all files except that of the evaluations.

        Args:
            history: record of each update.
            per_task: training episodes and successes of each task.
            status: counters of the replay service.
        """
        write_json(self._folder.results / "training_metrics.json", by_epoch(history))
        stats = {
            success.task_id: {
                "stored": success.num_stored,
                "used": success.num_used,
                "newest_version": {"lineage": success.newest_version.lineage, "step": success.newest_version.step},
            }
            for success in status.successes
        }
        write_json(self._folder.results / "replay_buffer_stats.json", stats)
        evaluations = self.evaluations()
        for task_id, task in self._tasks.items():
            record = {
                "task_id": task_id,
                "instruction": task.get("instruction", ""),
                "train": per_task.get(task_id, {"n": 0, "success": 0}),
                "eval": {when: done["per_task"].get(task_id) for when, done in evaluations.items()},
                "replay": stats.get(task_id),
            }
            write_json(self._folder.task_results / f"{task_id}.json", record)
