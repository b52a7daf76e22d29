"""Trajectories and task groups, decoded from the messages of the replay service."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from deskrl.core.reward_evidence import reward_terms
from deskrl.core.step_codec import Step, decode_step
from deskrl.proto.v1 import replay_pb2


@dataclass(frozen=True)
class Trajectory:
    """One finished episode."""

    episode_id: str
    task_id: str
    reward: float
    """Reward of the evaluator."""
    steps: tuple[Step, ...]
    format_ok: bool = True
    """False if the episode ended with an action that could not be parsed."""
    from_success_buffer: bool = False
    """Whether this is a success from the success buffer that replaced a member; it counts in no success rate."""
    reward_terms: Mapping[str, float] = field(default_factory=dict)
    """Value of each term of the reward by name; empty if the task's own evaluator is the only term."""


@dataclass(frozen=True)
class TaskGroup:
    """Fresh episodes of one task, with the stored success that the replay service offers."""

    group_id: str
    task_id: str
    members: tuple[Trajectory, ...]
    stored_success: Trajectory | None = None
    """Success of the task from the success buffer, offered if the group failed."""
    num_faulted: int = 0
    """Number of episodes lost to faults."""


def decode_group(group: replay_pb2.Group) -> TaskGroup:
    """Decode a group.

    Raises:
        deskrl.core.step_codec.CodecError: a step has another format.
    """
    has_success = group.HasField("candidate")
    return TaskGroup(
        group_id=group.group_id,
        task_id=group.task_id,
        members=tuple(decode_episode(episode) for episode in group.episodes),
        stored_success=decode_episode(group.candidate, from_success_buffer=True) if has_success else None,
        num_faulted=group.num_faulted,
    )


def decode_episode(episode: replay_pb2.Episode, from_success_buffer: bool = False) -> Trajectory:
    """Decode an episode; `from_success_buffer` marks a success from the success buffer."""
    return Trajectory(
        episode_id=episode.episode_id,
        task_id=episode.task_id,
        reward=episode.result.reward,
        steps=tuple(decode_step(data) for data in episode.steps),
        format_ok=episode.result.format_ok,
        from_success_buffer=from_success_buffer,
        reward_terms=reward_terms(episode.result.evidence_json),
    )
