"""Record of a finished job: plain values for the checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AcknowledgedResult:
    """Result of an episode that replay acknowledged to an actor as stored on disk."""

    episode_id: str
    reward: float
    num_steps: int
    seen_s: float
    """Time at which the actor's log entry was read, on the monotonic clock."""


@dataclass(frozen=True)
class StoredEpisode:
    """Rollout in the replay store."""

    episode_id: str
    group_id: str
    state: str
    reward: float | None
    num_steps: int
    step_indices: tuple[int, ...]
    """Indices of the stored steps."""
    versions: frozenset[tuple[str, int]]
    """Policy versions that sampled its tokens: lineage and step."""
    lost_images: tuple[str, ...]
    """Hashes of screenshots that its steps reference and that are missing or damaged."""


@dataclass(frozen=True)
class StoredGroup:
    """Group in the training queue of the replay store."""

    group_id: str
    state: str
    num_planned: int
    num_leased: int
    num_finished: int
    num_faulted: int


@dataclass(frozen=True)
class Record:
    """Record of a finished job."""

    num_updates: int
    """Configured number of updates."""
    num_rollouts: int
    """Configured rollouts per group."""
    max_staleness: int
    acknowledged: Sequence[AcknowledgedResult]
    episodes: Mapping[str, StoredEpisode]
    groups: Sequence[StoredGroup]
    committed: frozenset[str]
    """Committed batches."""
    trained: Mapping[str, Mapping[str, frozenset[str]]]
    """Episodes that the learner trained on, by batch and group, without those of the success buffer."""
    history: Sequence[Mapping[str, Any]]
    """Updates contained in the newest checkpoint, one entry each."""
    updates: Sequence[Mapping[str, Any]]
    """Update metrics of the run, one entry per execution of an update."""
    weights: Sequence[Mapping[str, Any]]
    """Metrics of weight updates, one entry per update of a replica."""
    unexpected_exits: Sequence[str]
    """Exits of roles that no fault explains."""
    orphans: Sequence[str]
    """Processes and folders that outlived their owner."""
