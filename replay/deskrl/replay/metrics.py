"""Prometheus metrics of the replay service."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from deskrl.proto.v1 import replay_pb2
from deskrl.replay.damaged_episodes import DamagedEpisode
from deskrl.replay.writer import Commit

MIN_ATTEMPTS = 10
"""Number of attempts of a task, with a result or a lost connection, below which its share is not meaningful."""


class ReplayMetrics:
    """Metrics of one service in a registry of their own, so that several services can share a process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.leases = Counter("deskrl_replay_leases_granted_total", "Leases granted.", registry=self.registry)
        self.active = Gauge("deskrl_replay_active_leases", "Active leases.", registry=self.registry)
        self.expired = Counter("deskrl_replay_leases_expired_total", "Leases that expired.", registry=self.registry)
        self.episodes = Counter(
            "deskrl_replay_episodes_finished_total", "Episodes that finished with a result.", registry=self.registry
        )
        self.steps = Counter("deskrl_replay_steps_total", "Steps received.", registry=self.registry)
        self.image_bytes = Counter(
            "deskrl_replay_image_bytes_total", "Screenshot bytes received.", registry=self.registry
        )
        self.faults = Counter(
            "deskrl_replay_faults_total", "Attempts ended by a fault, by kind.", ["kind"], registry=self.registry
        )
        self.lost_connections = Gauge(
            "deskrl_replay_lost_connection_ratio",
            "Largest share of a task's attempts whose connection was lost after the policy's first action, "
            f"over tasks with at least {MIN_ATTEMPTS} attempts.",
            registry=self.registry,
        )
        self.damaged = Counter(
            "deskrl_replay_damaged_episodes_total",
            "Episodes that were found damaged on disk.",
            registry=self.registry,
        )
        self.batches = Counter("deskrl_replay_batches_committed_total", "Batches committed.", registry=self.registry)
        self.commits = Histogram(
            "deskrl_replay_commit_seconds",
            "Duration of one transaction.",
            buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
            registry=self.registry,
        )
        self.operations = Counter(
            "deskrl_replay_operations_total",
            "Write operations; several share one transaction.",
            registry=self.registry,
        )
        self.streams = Gauge("deskrl_replay_open_streams", "Open episode streams.", registry=self.registry)

    def observe_lost_connections(self, tasks: Sequence[replay_pb2.LostConnections]) -> None:
        """Record the lost connections of all tasks that have any."""
        attempts = {task.task_id: task.num_lost + task.num_finished for task in tasks}
        shares = [task.num_lost / attempts[task.task_id] for task in tasks if attempts[task.task_id] >= MIN_ATTEMPTS]
        self.lost_connections.set(max(shares, default=0.0))

    def observe_set_aside(self, episodes: Sequence[DamagedEpisode]) -> None:
        """Count damaged episodes. Called in the writer's thread."""
        self.damaged.inc(len(episodes))

    def observe_commit(self, commit: Commit) -> None:
        """Record a transaction. Called in the writer's thread."""
        self.commits.observe(commit.duration_s)
        self.operations.inc(commit.num_operations)
