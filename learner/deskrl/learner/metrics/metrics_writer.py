"""Metrics writer: writes each metric of the learner to metrics.jsonl, the trackers, Prometheus and the result files."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from deskrl.core.run_dir import RunDir
from deskrl.learner.metrics import prometheus
from deskrl.learner.metrics.metric_records import weights_record
from deskrl.learner.metrics.result_files import ResultFiles
from deskrl.learner.metrics.run_trackers import RunTrackers
from deskrl.learner.metrics.update_stats import WarmStartReport
from deskrl.learner.train_state import TrainState
from deskrl.learner.weights.manifest import PublishOutcome
from deskrl.proto.v1 import common_pb2, replay_pb2

_log = logging.getLogger(__name__)


class MetricsWriter:
    """Writes the metrics of one run; on ranks other than 0 it only logs.

    Args:
        folder: run directory.
        results: result files of the run.
        trackers: experiment trackers; None on ranks other than 0.
        applications: application of each task.
    """

    def __init__(
        self, folder: RunDir, results: ResultFiles, trackers: RunTrackers | None, applications: Mapping[str, str]
    ) -> None:
        self._folder = folder
        self._results = results
        self._trackers = trackers
        self._applications = applications
        prometheus.create_application_series(set(applications.values()))

    def write_phase(self, name: str) -> None:
        """Write that a phase of the run begins."""
        _log.info("phase: %s", name)
        self._append("phase", phase=name)

    def write_warm_start(self, report: WarmStartReport, likelihood: float | None) -> None:
        """Write an optimizer step of the warm start.

        Args:
            report: statistics of the optimizer step.
            likelihood: likelihood of the least likely task; None if likelihoods are not measured.
        """
        self._append("imitation", likelihood=likelihood, **asdict(report))

    def write_update(self, record: Mapping[str, Any], seconds: Mapping[str, float]) -> None:
        """Write an update.

        Args:
            record: record of the update.
            seconds: duration of each phase of the update.
        """
        self._append("update", **record, seconds=seconds)
        if self._trackers is not None:
            prometheus.observe_update(record, seconds, self._applications)

    def write_missing_update(self, state: TrainState) -> None:
        """Write the latest update again if the previous learner was killed after its checkpoint and before its line."""
        written = {line["update"] for line in self._folder.read_metrics("update")}
        for record in state.history[-1:]:
            if record["update"] not in written:
                self._append("update", **record, seconds={})  # the durations are lost

    def write_evaluation(self, when: str, version: int, record: Mapping[str, Any]) -> None:
        """Write an evaluation.

        Args:
            when: `before` or `after` training.
            version: step of the evaluated policy version.
            record: record of the evaluation.
        """
        if self._trackers is not None:
            self._results.add_evaluation(when, record)
            prometheus.observe_evaluation(record)
        self._append("eval", when=when, version=version, **record)

    def write_weight_update(self, outcome: PublishOutcome) -> None:
        """Write a weight update of a replica; called from the publisher's threads, on rank 0."""
        record = weights_record(outcome)
        self._folder.append_metrics("weights", **record)
        prometheus.observe_weight_update(record)

    def write_published(self, version: common_pb2.PolicyVersion, num_quarantined: int) -> None:
        """Write the published policy version and the number of replicas that do not serve it."""
        if self._trackers is not None:
            prometheus.POLICY_STEP.set(version.step)
            prometheus.QUARANTINED.set(num_quarantined)

    def write_results(self, state: TrainState, status: replay_pb2.GetReplayStatusResponse) -> None:
        """Write the result files and the content of the success buffer; on rank 0.

        Args:
            state: training state.
            status: counters of the replay service.
        """
        self._results.write(state.history, state.per_task, status)
        stored = {success.task_id: success.num_stored for success in status.successes}
        used = {success.task_id: success.num_used for success in status.successes}
        self._append("replay", stored=stored, used=used)

    def close(self) -> None:
        """Flush and close the trackers."""
        if self._trackers is not None:
            self._trackers.close()

    def _append(self, kind: str, **values: Any) -> None:
        if self._trackers is not None:
            self._folder.append_metrics(kind, **values)
            self._trackers.log(kind, values)
