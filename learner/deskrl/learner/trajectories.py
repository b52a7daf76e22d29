"""Episodes and groups as the learner thinks of them. Knows the wire form they come in; decides nothing."""

from __future__ import annotations

from dataclasses import dataclass

from deskrl.core.trajectory import Step, decode_step
from deskrl.proto.v1 import replay_pb2


@dataclass(frozen=True)
class Trajectory:
    """One finished episode."""

    episode_id: str
    task_id: str
    reward: float
    steps: tuple[Step, ...]
    format_ok: bool = True
    """False: it ended with an action that could not be parsed."""
    replayed: bool = False
    """A stored success that took the place of a member; it counts in no success rate."""


@dataclass(frozen=True)
class TaskGroup:
    """Episodes of one task, of equal footing, and the stored success that came with them."""

    group_id: str
    task_id: str
    members: tuple[Trajectory, ...]
    candidate: Trajectory | None = None
    num_faulted: int = 0


def decode_group(group: replay_pb2.Group) -> TaskGroup:
    """A group off the wire; raises `deskrl.core.trajectory.CodecError` for steps of another format."""
    return TaskGroup(
        group_id=group.group_id,
        task_id=group.task_id,
        members=tuple(decode_episode(episode) for episode in group.episodes),
        candidate=decode_episode(group.candidate, replayed=True) if group.HasField("candidate") else None,
        num_faulted=group.num_faulted,
    )


def decode_episode(episode: replay_pb2.Episode, replayed: bool = False) -> Trajectory:
    """An episode off the wire."""
    return Trajectory(
        episode_id=episode.episode_id,
        task_id=episode.task_id,
        reward=episode.result.reward,
        steps=tuple(decode_step(data) for data in episode.steps),
        format_ok=episode.result.format_ok,
        replayed=replayed,
    )
