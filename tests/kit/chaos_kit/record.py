"""What a job left behind, as plain values. Knows neither where they come from nor what they should be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Acknowledged:
    """A result that replay told an actor to be on disk."""

    episode_id: str
    reward: float
    num_steps: int
    seen_s: float
    """When the actor was seen to say so, on the monotonic clock."""


@dataclass(frozen=True)
class StoredEpisode:
    """A rollout of the store."""

    episode_id: str
    group_id: str
    state: str
    reward: float | None
    num_steps: int
    step_indices: tuple[int, ...]
    """Of the steps that are there."""
    versions: frozenset[tuple[str, int]]
    """Policies that sampled its tokens: lineage and step."""
    lost_images: tuple[str, ...]
    """Screenshots that its steps name, and that are not there whole."""


@dataclass(frozen=True)
class StoredGroup:
    """A group of the store's training queue."""

    group_id: str
    state: str
    num_planned: int
    num_leased: int
    num_finished: int
    num_faulted: int


@dataclass(frozen=True)
class Record:
    """A job that has ended."""

    num_updates: int
    """That it was to make."""
    rollouts: int
    """Members of a group."""
    max_staleness: int
    acknowledged: Sequence[Acknowledged]
    episodes: Mapping[str, StoredEpisode]
    groups: Sequence[StoredGroup]
    committed: frozenset[str]
    """Batches."""
    learnt: Mapping[str, Mapping[str, frozenset[str]]]
    """Batch, group, episodes: what the learner says it has learnt from, stored successes left out."""
    history: Sequence[Mapping[str, Any]]
    """What the newest checkpoint says of its updates, one entry each."""
    updates: Sequence[Mapping[str, Any]]
    """Its metrics, one entry each time an update was made."""
    weights: Sequence[Mapping[str, Any]]
    """One entry for each update of a replica."""
    endings: Sequence[str]
    """Roles that ended though no fault had ended them."""
    orphans: Sequence[str]
