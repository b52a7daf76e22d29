"""Prometheus metrics of the replay service. Knows names and units; others count."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from deskrl.replay.writer import Commit


class Metrics:
    """One registry for each service, so that several can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.leases = Counter("deskrl_replay_leases_granted_total", "Leases granted.", registry=self.registry)
        self.active = Gauge("deskrl_replay_active_leases", "Leases that are running.", registry=self.registry)
        self.expired = Counter("deskrl_replay_leases_expired_total", "Leases that ran out.", registry=self.registry)
        self.episodes = Counter(
            "deskrl_replay_episodes_finished_total", "Episodes with a result.", registry=self.registry
        )
        self.steps = Counter("deskrl_replay_steps_total", "Steps received.", registry=self.registry)
        self.image_bytes = Counter(
            "deskrl_replay_image_bytes_total", "Screenshot bytes received.", registry=self.registry
        )
        self.faults = Counter(
            "deskrl_replay_faults_total", "Attempts ended by a fault.", ["kind"], registry=self.registry
        )
        self.batches = Counter("deskrl_replay_batches_committed_total", "Batches consumed.", registry=self.registry)
        self.commits = Histogram(
            "deskrl_replay_commit_seconds",
            "Duration of one transaction.",
            buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
            registry=self.registry,
        )
        self.operations = Counter(
            "deskrl_replay_operations_total", "Operations; several share a commit.", registry=self.registry
        )
        self.streams = Gauge("deskrl_replay_open_streams", "Episodes being streamed.", registry=self.registry)

    def committed(self, commit: Commit) -> None:
        """A transaction went through. Called in the writer's thread."""
        self.commits.observe(commit.duration_s)
        self.operations.inc(commit.num_operations)
